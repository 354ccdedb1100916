"""Runs kernels in Triton's interpreter on tensors that lie between pages of memory which nobody may touch.

    TRITON_INTERPRET=1 PYTHONPATH=. python tests/kernels/guard_pages.py lowrank 20    # mode, number of random cases

Reading or writing beside a tensor ends the process by a signal: without a GPU, what NVIDIA's memcheck finds with one.
"""

import ctypes
import dataclasses
import mmap
import random
import sys
from collections.abc import Callable
from unittest.mock import patch

import torch

from tests.kernels.cases import Case, run

# Bytes on either side that nobody may touch.
GUARD = 64 * mmap.PAGESIZE
NO_ACCESS = 0
SHORT = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 70)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_empty = torch.empty


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A contiguous copy that ends where the forbidden memory behind it starts, or starts where that before it ends."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    # PyTorch keeps the object, and Python does not unmap it while its address is held: nothing else moves in.
    memory = mmap.mmap(-1, pages + 2 * GUARD)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (start, start + GUARD + pages):
        if _libc.mprotect(forbidden, GUARD, NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = GUARD + (pages - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def guarded_empty(at_end: bool) -> Callable[..., torch.Tensor]:
    """torch.empty, whose memory is guarded."""
    return lambda *args, **kwargs: guarded(_empty(*args, **kwargs), at_end)


def random_case(draw: random.Random, mode: str) -> Case:
    channels = draw.choice((16, 20, 48, 128, 144))
    dtype = draw.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    return Case(
        mode,
        batch=draw.randint(1, 2),
        tokens=draw.choice(SHORT),
        channels=channels,
        kernel_size=draw.choice((1, 2, 3, 4, 4, 5, 8)),
        rank=draw.choice((1, 8, 15, 20)),
        heads=draw.choice([h for h in (1, 2, 4, 16, 20) if channels % h == 0]),
        dtype=dtype,
        parameter_dtype=draw.choice((dtype, torch.float32)),
        static=draw.random() < 0.7,
        residual=draw.random() < 0.7,
        positions=draw.choice(("none", "packed")),
        state=draw.random() < 0.3,
    )


def run_guarded(case: Case, at_end: bool) -> None:
    """Forward and backward: inputs, results and whatever the launchers allocate are guarded."""
    inputs = {name: guarded(a.detach(), at_end).requires_grad_() for name, a in case.inputs().items()}
    dy, positions = guarded(case.output_gradient(), at_end), case.token_positions()
    if positions is not None:
        positions = guarded(positions, at_end)
    empty = patch.object(torch, "empty", guarded_empty(at_end))
    with empty, patch.object(Case, "token_positions", lambda _: positions):
        run(case, inputs, dy, "triton")


def main() -> None:
    mode, cases = sys.argv[1], int(sys.argv[2])
    draw = random.Random(mode)
    for _ in range(cases):
        case, at_end = random_case(draw, mode), draw.random() < 0.5
        # Printed first: it is the last line when the process is ended.
        print(dataclasses.asdict(case), "end" if at_end else "start", flush=True)
        run_guarded(case, at_end)


if __name__ == "__main__":
    main()
