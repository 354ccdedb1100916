"""What launching the Triton kernels shares: strides a kernel may rely on, sizes by rule, the device to launch on."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "Rows",
    "dot_settings",
    "flat_rows",
    "multiprocessors",
    "on_device",
    "rows",
    "state_rows",
    "up_to_registers",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Strides that come from B and T must not be specialised on (each new shape would compile a new kernel), but wide
# loads need to know that rows start at multiples of 16 elements. So kernels take the batch stride as a count of
# such multiples, and multiply it by this constant.
_ALIGNMENT = 16


class Rows(NamedTuple):
    """A (B, T, ...) tensor whose trailing dimensions are contiguous; its batch stride is stride_b * alignment."""

    tensor: torch.Tensor
    stride_b: int
    stride_t: int
    alignment: int


def rows(tensor: torch.Tensor, wide: bool = True) -> Rows:
    """Passes on any batch and token strides; copies a tensor whose trailing dimensions are not contiguous.

    wide: the kernel gets the alignment, too; without, stride_b is a count of elements.
    """
    expected = 1
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            tensor = tensor.contiguous()
            break
        expected *= size
    stride_b = 0 if tensor.shape[0] == 1 else tensor.stride(0)
    stride_t = tensor.stride(1)
    aligned = wide and stride_b % _ALIGNMENT == 0 and stride_t % _ALIGNMENT == 0
    alignment = _ALIGNMENT if aligned else 1
    return Rows(tensor, stride_b // alignment, stride_t, alignment)


def flat_rows(positions: torch.Tensor | None, x: torch.Tensor) -> Rows:
    """Positions (B, T) or (1, T); without any, a stand-in that the kernel does not read."""
    if positions is None:
        return Rows(x, 0, 0, 1)
    return Rows(positions, 0 if positions.shape[0] == 1 else positions.stride(0), positions.stride(1), 1)


def state_rows(state: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The state, contiguous; without one, a stand-in that the kernel does not read."""
    return x if state is None or state.numel() == 0 else state.contiguous()


def dot_settings(dtype: torch.dtype) -> dict[str, object]:
    """The operand type and precision of matrix products for inputs of `dtype`.

    bfloat16 is exact on the matrix units with float32 sums. In float16 a product of two inputs (x and dy) may
    overflow: tf32 holds float16's digits with float32's range. float32 must not lose digits to tf32.
    """
    if dtype == torch.bfloat16:
        # The interpreter has no bfloat16 product: it multiplies the bit patterns.
        return {"DOT": tl.float32 if INTERPRETED else tl.bfloat16, "PRECISION": "ieee"}
    return {"DOT": tl.float32, "PRECISION": "tf32" if dtype == torch.float16 else "ieee"}


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side; a small number in the interpreter, to keep it quick."""
    return _multiprocessors(device.index or 0) if device.type == "cuda" else 2


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def up_to_registers(count: int) -> dict[str, int]:
    """The launch option that lets a thread have so many registers, where there is one.

    Left alone, NVIDIA's compiler saves some, for more programs side by side than there are, and puts into local memory
    what then has no place.
    """
    return {"maxnreg": count} if torch.version.hip is None else {}
