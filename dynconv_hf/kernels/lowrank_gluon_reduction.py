"""Adds the partial sums that `lowrank_gluon_backward` leaves, in a fixed order: the same bits in every run."""

import triton
import triton.language as tl

__all__ = ["DU_ELEMENTS", "DZ_ROWS", "lowrank_reduction_kernel"]

DZ_ROWS = 32
DU_ELEMENTS = 512


@triton.jit(do_not_specialize=["T", "L", "rows", "sequence_chunks", "chunks", "dz_programs"])
def lowrank_reduction_kernel(
    dz_partial_ptr,
    du_partial_ptr,
    dz_ptr,
    dbasis_ptr,
    dstatic_ptr,
    T,
    L,
    rows,
    sequence_chunks,
    chunks,
    dz_programs,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
    DZ_ROWS: tl.constexpr,
    DU_ELEMENTS: tl.constexpr,
):
    """Grid (dz_programs + du_programs,), the two kinds of sums one after the other in one launch.

    dz_partial: (BLOCKS, chunks, L / 2, 16, 16), a pair's 16 rows being 8 * h + g for token h of run g.
    du_partial: (chunks, 16, 4, D).
    """
    program = tl.program_id(0)
    if program < dz_programs:
        first_row = program.to(tl.int64) * DZ_ROWS
        _reduce_dz(dz_partial_ptr, dz_ptr, first_row, T, L, rows, sequence_chunks, chunks, R, BLOCKS, DZ_ROWS)
    else:
        first = (program - dz_programs) * DU_ELEMENTS
        _reduce_du(du_partial_ptr, dbasis_ptr, dstatic_ptr, first, chunks, D, R, DU_ELEMENTS)


@triton.jit
def _reduce_dz(
    partial_ptr,
    dz_ptr,
    first_row,
    T,
    L,
    rows,
    sequence_chunks,
    chunks,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = first_row + tl.arange(0, ROWS)
    # Only scalars are divided in 64 bits: it is slow.
    token = (first_row % T).to(tl.int32) + tl.arange(0, ROWS)
    sequence = (first_row // T).to(tl.int32) + token // T
    token = token % T
    chunk = sequence * sequence_chunks + token // (8 * L)
    run = token // L % 8
    step = token % L
    tile_row = (chunk.to(tl.int64) * (L // 2) + step // 2) * 16 + step % 2 * 8 + run
    rank = tl.arange(0, 16)
    pointers = partial_ptr + tile_row[:, None] * 16 + rank[None, :]
    mask = (row < rows)[:, None] & (rank < R)[None, :]
    plane = chunks.to(tl.int64) * L * 128
    total = tl.zeros((ROWS, 16), tl.float32)
    for block in tl.static_range(BLOCKS):
        total += tl.load(pointers + block * plane, mask=mask, other=0.0)
    tl.store(dz_ptr + row[:, None] * R + rank[None, :], total.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _reduce_du(
    partial_ptr, dbasis_ptr, dstatic_ptr, first, chunks, D: tl.constexpr, R: tl.constexpr, ELEMENTS: tl.constexpr
):
    element = first + tl.arange(0, ELEMENTS)
    total = tl.zeros((ELEMENTS,), tl.float32)
    # Eight loads at once, or the sum would wait for each in turn.
    for chunk in range(0, chunks, 8):
        for ahead in tl.static_range(8):
            pointers = partial_ptr + (chunk + ahead).to(tl.int64) * (64 * D) + element
            total += tl.load(pointers, mask=chunk + ahead < chunks, other=0.0)
    # 4 * D is a multiple of ELEMENTS: a program's elements are of one rank.
    if first < R * 4 * D:
        tl.store(dbasis_ptr + element, total.to(dbasis_ptr.dtype.element_ty))
    elif dstatic_ptr is not None:
        tl.store(dstatic_ptr + (element - R * 4 * D), total.to(dstatic_ptr.dtype.element_ty))
