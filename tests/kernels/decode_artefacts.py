"""Compiles the decode kernel for sm_90 without a GPU and prints what each case uses, as JSON lines.

Must run without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

import json
from collections.abc import Iterator

import torch

from dynconv_hf.kernels import decode
from tests.kernels.artefacts import Recorder, compile_sm90, resources

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    # B, hidden, channels, head_dim, W, R, dtype, parameters' dtype, everything optional
    (1, 2048, (2048, 2048, 2048), 64, 4, 15, BF16, BF16, True),
    (32, 2048, (2048, 2048, 2048), 64, 4, 15, BF16, BF16, True),
    (1, 4096, (4096, 1024, 1024), 128, 4, 15, BF16, BF16, True),
    (32, 4096, (4096, 1024, 1024), 128, 4, 15, BF16, BF16, True),
    (1, 8192, (28672, 28672), 128, 4, 15, BF16, BF16, False),
    (1, 2048, (2048, 512, 512), 64, 8, 64, BF16, BF16, True),
    (32, 2048, (2048, 512, 512), 64, 8, 64, BF16, BF16, True),
    (1, 2048, (2048, 512, 512), 64, 8, 16, BF16, FP32, True),
    (32, 2048, (2048, 512, 512), 64, 8, 16, BF16, FP32, True),
    (1, 2048, (2048, 512, 512), 64, 4, 15, FP32, FP32, True),
    (32, 2048, (2048, 512, 512), 64, 4, 15, FP32, FP32, True),
    (1, 3200, (3200, 3200, 3200), 100, 4, 15, FP16, FP16, True),
    (32, 3200, (3200, 3200, 3200), 100, 4, 15, FP16, FP16, True),
    (1, 3072, (3072, 1024, 1024), 96, 1, 3, FP16, FP16, False),
]


def arguments(
    b: int,
    hidden: int,
    channels: tuple[int, ...],
    head_dim: int,
    w: int,
    r: int,
    dtype: torch.dtype,
    parameter: torch.dtype,
    full: bool,
) -> dict:
    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return {
        "hidden_states": tensor(b, 1, hidden),
        "xs": [tensor(b, 1, d) for d in channels],
        "filter_weights": [tensor(r, hidden, dtype=parameter) for _ in channels],
        "bases": [tensor(r, w, d, dtype=parameter) for d in channels],
        "static_filters": [tensor(w, d, dtype=parameter) for d in channels] if full else [],
        "states": [tensor(b, d, w - 1) for d in channels],
        "positions": tensor(b, 1, dtype=torch.int32) if full else None,
        "cos": tensor(b, 1, head_dim) if full else None,
        "sin": tensor(b, 1, head_dim) if full else None,
        "head_dim": head_dim,
        "rotated": [True, True, False][: len(channels)],
        "residual": full,
    }


def report() -> Iterator[dict]:
    whole = decode._decode_kernel
    for case in CASES:
        launches: list = []
        decode._decode_kernel = Recorder(whole, launches)
        decode.decode_step(**arguments(*case))
        yield {"case": str(case), **resources(compile_sm90(*launches[0]))}


if __name__ == "__main__":
    for row in report():
        print(json.dumps(row), flush=True)
