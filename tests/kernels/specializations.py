"""What the plain Triton kernels would be compiled for, over batch sizes and numbers of tokens; without a GPU.

    PYTHONPATH=. python tests/kernels/specializations.py    # JSON lines: case, programs of one shape, of all shapes

Must run without TRITON_INTERPRET: interpreted kernels are not specialised.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dynconv_hf.kernels import direct, launch, lowrank
from tests.kernels import artefacts
from tests.kernels.artefacts import meta_tensor

SHAPES = [(2, 512), (1, 1), (1, 2), (3, 1), (2, 16), (1, 37), (3, 255), (5, 777), (16, 64), (1, 4097), (4, 8192)]
CHANNELS = 192


def launches(mode: str, dtype: torch.dtype, kernel_size: int, masked: bool, batch: int, tokens: int) -> list:
    """Those of forward and backward; masked: positions and state."""
    x, common = artefacts.arguments(dtype, dtype, kernel_size, CHANNELS, True, masked, batch, tokens)
    kernels: tuple[Callable, Callable] = (direct.forward, direct.backward)
    filters: tuple = (None,)
    if mode == "lowrank":
        kernels = (lowrank.forward, lowrank.backward)
        filters = (meta_tensor(batch, tokens, 15, dtype=dtype), meta_tensor(15, kernel_size, CHANNELS, dtype=dtype))
    elif mode == "headwise":
        filters = (meta_tensor(batch, tokens, CHANNELS // 4, kernel_size, dtype=dtype),)
    forward, backward = kernels
    return [
        *artefacts.record(forward, x, *filters, *common),
        *artefacts.record(backward, x, x, *filters, *common),
    ]


def programs(*case: Any) -> set[str]:
    return {
        f"{kernel.fn.__module__}.{kernel.fn.__name__}{artefacts.specialization(kernel, args, kwargs)}"
        for kernel, args, kwargs in launches(*case)
    }


def report() -> Iterator[dict]:
    for mode in ("lowrank", "headwise", "static"):
        for dtype in (torch.bfloat16, torch.float32):
            for kernel_size in (1, 2, 3, 4, 8):
                for masked in (False, True):
                    of_shapes = [programs(mode, dtype, kernel_size, masked, *shape) for shape in SHAPES]
                    case = f"{mode} {artefacts.TYPES[dtype]} W{kernel_size}{' masked' if masked else ''}"
                    yield {"case": case, "one": len(of_shapes[0]), "all": len(set.union(*of_shapes))}


if __name__ == "__main__":
    if launch.INTERPRETED:
        raise SystemExit(f"TRITON_INTERPRET is {os.environ['TRITON_INTERPRET']!r}: unset it")
    artefacts.without_device()
    for row in report():
        print(json.dumps(row), flush=True)
