"""Sums of partial results in a fixed order: what takes the place of atomics, whose order, and bits, vary."""

import torch
import triton
import triton.language as tl

from .launch import on_device

__all__ = ["sum_partials"]

_PARTS, _BLOCK = 16, 64


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
        _sum_partials_kernel[(triton.cdiv(size, _BLOCK),)](
            partials,
            first,
            first if second is None else second,
            parts,
            size,
            first.numel(),
            PARTS=_PARTS,
            BLOCK=_BLOCK,
        )
