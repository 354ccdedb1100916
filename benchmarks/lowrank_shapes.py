"""Device time of the low-rank convolution for kernel sizes, ranks and types that are not the usual ones.

    python benchmarks/lowrank_shapes.py --out shapes.json    # then: python benchmarks/plot.py shapes.json

As `kernel_speed.py`, which measures the usual ones: against memory's own speed and the formula in PyTorch.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from kernel_speed import print_row, rows_of
from report import write_report

# dtype, W, R.
SHAPES = [
    ("bfloat16", 4, 15),
    ("bfloat16", 2, 15),
    ("bfloat16", 3, 15),
    ("bfloat16", 8, 15),
    ("bfloat16", 4, 31),
    ("bfloat16", 4, 63),
    ("float16", 4, 15),
    ("float32", 4, 15),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lowrank_shapes.json"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--ours-only", action="store_true", help="leave out the formula, eager and compiled")
    args = parser.parse_args()
    torch.manual_seed(0)
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    shape = {k: v for k, v in vars(args).items() if k != "out"}
    rows: list[dict[str, Any]] = []
    for dtype, kernel_size, rank in SHAPES:
        # Compiled for another shape, the formula would be compiled again for any.
        torch.compiler.reset()
        call = argparse.Namespace(**shape, dtype=dtype, kernel_size=kernel_size, rank=rank)
        for row in rows_of("lowrank", None, call, flush):
            rows.append(row | {"mode": f"W={kernel_size}, R={rank}, {dtype}"})
            print_row(rows[-1])
        write_report(args.out, rows, shape=shape)


if __name__ == "__main__":
    main()
