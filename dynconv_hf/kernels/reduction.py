"""Sums of partial results in a fixed order: what takes the place of atomics, whose order, and bits, vary."""

import torch
import triton
import triton.language as tl

from .launch import on_device

__all__ = ["ROW", "sum_partials", "sum_run_partials"]

# Few columns and many parts, as of a filter's gradient: so many parts at a time, by so many columns.
_PARTS, _COLUMNS = 16, 64
# Many columns and few parts, as of a whole run's: so many columns, by so many parts that are loaded before the first
# of them is added. A sum that waits for each load in turn is slow.
_BLOCK, _AHEAD = 512, 8
# Elements of a row of partial sums of the coefficients' gradient.
ROW = 16


@triton.jit(do_not_specialize=["parts", "size", "split"])
def _sum_partials_kernel(
    partial_ptr, first_ptr, second_ptr, parts, size, split, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """PARTS of the partial results at a time, as many loads in flight: there may be few columns and many parts."""
    part_P = tl.arange(0, PARTS)
    i_I = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total_PI = tl.zeros((PARTS, BLOCK), tl.float32)
    offset_PI = part_P.to(tl.int64)[:, None] * size + i_I[None, :]
    for part in range(0, parts, PARTS):
        mask_PI = (part + part_P < parts)[:, None] & (i_I < size)[None, :]
        total_PI += tl.load(partial_ptr + offset_PI, mask=mask_PI, other=0.0)
        partial_ptr += size.to(tl.int64) * PARTS
    total_I = tl.sum(total_PI, axis=0)
    tl.store(first_ptr + i_I, total_I.to(first_ptr.dtype.element_ty), mask=i_I < split)
    tl.store(second_ptr + (i_I - split), total_I.to(second_ptr.dtype.element_ty), mask=(i_I >= split) & (i_I < size))


def sum_partials(partials: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> None:
    """Sums partials (parts, size), float32, over the parts; the sum fills `first`, then `second`, both contiguous."""
    parts, size = partials.shape
    if size == 0:
        return
    with on_device(partials):
        _sum_partials_kernel[(triton.cdiv(size, _COLUMNS),)](
            partials,
            first,
            first if second is None else second,
            parts,
            size,
            first.numel(),
            PARTS=_PARTS,
            BLOCK=_COLUMNS,
        )


@triton.jit
def _sum_parts(partial_ptr, size, parts, i_I, mask_I, AHEAD: tl.constexpr):
    total_I = tl.zeros(i_I.shape, tl.float32)
    for _ in range(parts // AHEAD):
        for ahead in tl.static_range(AHEAD):
            total_I += tl.load(partial_ptr + ahead * size + i_I, mask=mask_I, other=0.0)
        partial_ptr += AHEAD * size
    for _ in range(parts % AHEAD):
        total_I += tl.load(partial_ptr + i_I, mask=mask_I, other=0.0)
        partial_ptr += size
    return total_I


@triton.jit(do_not_specialize=["rows", "blocks", "chunks", "row_programs"])
def _sum_run_partials_kernel(
    dz_partial_ptr,
    du_partial_ptr,
    dz_ptr,
    dbasis_ptr,
    dstatic_ptr,
    rows,
    blocks,
    channel_rows,
    chunks,
    row_programs,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The first programs sum the coefficients' gradient, the others the basis' and the static filter's."""
    if tl.program_id(0) < row_programs:
        i_I = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        size = rows.to(tl.int64) * ROW
        total_I = _sum_parts(dz_partial_ptr, size, blocks, i_I, i_I < size, AHEAD)
        row_I, r_I = i_I // ROW, i_I % ROW
        mask_I = (i_I < size) & (r_I < RANK)
        tl.store(dz_ptr + row_I * RANK + r_I, total_I.to(dz_ptr.dtype.element_ty), mask=mask_I)
    else:
        i_I = (tl.program_id(0) - row_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        basis = channel_rows.to(tl.int64) * RANK
        total_I = _sum_parts(
            du_partial_ptr, channel_rows.to(tl.int64) * ROW, chunks, i_I, i_I < channel_rows * RANKS, AHEAD
        )
        tl.store(dbasis_ptr + i_I, total_I.to(dbasis_ptr.dtype.element_ty), mask=i_I < basis)
        if RANKS > RANK:
            mask_I = (i_I >= basis) & (i_I < channel_rows * RANKS)
            tl.store(dstatic_ptr + (i_I - basis), total_I.to(dstatic_ptr.dtype.element_ty), mask=mask_I)


def sum_run_partials(
    dz_partials: torch.Tensor,
    du_partials: torch.Tensor,
    dcoefficients: torch.Tensor,
    dbasis: torch.Tensor,
    dstatic: torch.Tensor | None,
) -> None:
    """Sums over the first dimension, in one launch; what it fills is contiguous.

    dz_partials (blocks, B * T, ROW), float32: the first columns are those of dcoefficients (B, T, RANK).
    du_partials (chunks, ROW, W * D), float32: dbasis (RANK, W, D), then dstatic (W, D).
    """
    blocks, rows, _ = dz_partials.shape
    chunks, _, channel_rows = du_partials.shape
    rank = dbasis.shape[0]
    ranks = rank + (dstatic is not None)
    row_programs = triton.cdiv(rows * ROW, _BLOCK)
    with on_device(dz_partials):
        _sum_run_partials_kernel[(row_programs + triton.cdiv(channel_rows * ranks, _BLOCK),)](
            dz_partials,
            du_partials,
            dcoefficients,
            dbasis,
            dbasis if dstatic is None else dstatic,
            rows,
            blocks,
            channel_rows,
            chunks,
            row_programs,
            RANK=rank,
            RANKS=ranks,
            ROW=ROW,
            BLOCK=_BLOCK,
            AHEAD=_AHEAD,
        )
