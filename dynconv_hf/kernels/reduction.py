"""Sums of partial results in a fixed order: what takes the place of atomics, whose order, and bits, vary."""

import torch
import triton
import triton.language as tl

from .launch import on_device

__all__ = ["sum_partials"]

_BLOCK = 512


@triton.jit(do_not_specialize=["parts", "size", "split"])
def _sum_partials_kernel(partial_ptr, first_ptr, second_ptr, parts, size, split, BLOCK: tl.constexpr):
    i_I = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total_I = tl.zeros((BLOCK,), tl.float32)
    part_ptr = partial_ptr
    for _ in range(parts):
        total_I += tl.load(part_ptr + i_I, mask=i_I < size, other=0.0)
        part_ptr += size
    tl.store(first_ptr + i_I, total_I.to(first_ptr.dtype.element_ty), mask=i_I < split)
    tl.store(second_ptr + (i_I - split), total_I.to(second_ptr.dtype.element_ty), mask=(i_I >= split) & (i_I < size))


def sum_partials(partials: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> None:
    """Sums partials (parts, size), float32, over the parts; the sum fills `first`, then `second`, both contiguous."""
    parts, size = partials.shape
    if size == 0:
        return
    with on_device(partials):
        _sum_partials_kernel[(triton.cdiv(size, _BLOCK),)](
            partials, first, first if second is None else second, parts, size, first.numel(), BLOCK=_BLOCK
        )
