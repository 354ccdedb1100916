"""How long the first call of a new shape takes, forward and backward, in a process that has run another shape.

    python benchmarks/first_call.py --out first_call.json

Wall clock, from the call to the end of the work on the device. Triton's cache on disk is a new, empty directory, as on
a machine that has never run the kernels. Each mode first runs one shape; then come others, each with the number of
kernels that were compiled for it. Another batch size or number of tokens must not compile anything.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import write_report

from dynconv_hf import kernels


class Shape(NamedTuple):
    """What a call is made of; the rank concerns lowrank, the head size headwise."""

    batch: int = 2
    tokens: int = 512
    channels: int = 512
    rank: int = 8
    head_size: int = 4
    kernel_size: int = 4


FIRST = Shape()
OTHER_MODEL = FIRST._replace(channels=2048, rank=15, head_size=16)
SHAPES = {
    "first": FIRST,
    "other B and T": FIRST._replace(batch=3, tokens=777),
    "B and T of 1": FIRST._replace(batch=1, tokens=1),
    "other D, R and head size": OTHER_MODEL,
    "these, other B and T": OTHER_MODEL._replace(batch=1, tokens=4097),
    "other W": FIRST._replace(kernel_size=3),
}
# Of bfloat16, the fastest kernels take some shapes; float32 goes to the general ones.
MODES = [("lowrank", "bfloat16"), ("lowrank", "float32"), ("headwise", "bfloat16"), ("static", "bfloat16")]


def call(mode: str, dtype: torch.dtype, shape: Shape) -> None:
    """The operation and its gradients, on new inputs."""

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda", dtype=dtype).requires_grad_()

    x = random(shape.batch, shape.tokens, shape.channels)
    static_filter = random(shape.kernel_size, shape.channels)
    if mode == "lowrank":
        coefficients = random(shape.batch, shape.tokens, shape.rank)
        basis = random(shape.rank, shape.kernel_size, shape.channels)
        y = kernels.lowrank_dynamic_conv1d(x, coefficients, basis, static_filter=static_filter)
    elif mode == "headwise":
        filters = random(shape.batch, shape.tokens, shape.channels // shape.head_size, shape.kernel_size)
        y = kernels.headwise_dynamic_conv1d(x, filters, static_filter=static_filter)
    else:
        y = kernels.static_conv1d(x, static_filter)
    y.backward(torch.ones_like(y))
    torch.cuda.synchronize()


def compiled_kernels(cache: Path) -> int:
    return len(list(cache.rglob("*.cubin")))


def rows(cache: Path) -> Iterator[dict[str, Any]]:
    for mode, dtype in MODES:
        for name, shape in SHAPES.items():
            before, started = compiled_kernels(cache), time.perf_counter()
            call(mode, getattr(torch, dtype), shape)
            seconds = time.perf_counter() - started
            yield {
                "mode": mode,
                "dtype": dtype,
                "shape": name,
                **shape._asdict(),
                "seconds": seconds,
                "compiled": compiled_kernels(cache) - before,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("first_call.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        # Read when the first kernel is compiled.
        os.environ["TRITON_CACHE_DIR"] = cache
        # What PyTorch itself does once is not the kernels'.
        x = torch.randn(64, 64, device="cuda", requires_grad=True)
        (x @ x).sum().backward()
        torch.cuda.synchronize()
        measured = []
        for row in rows(Path(cache)):
            measured.append(row)
            print(
                f"{row['mode']} {row['dtype']}, {row['shape']}: {row['seconds']:.2f} s, {row['compiled']} compiled",
                flush=True,
            )
    write_report(args.out, measured)


if __name__ == "__main__":
    main()
