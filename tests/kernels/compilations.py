"""What the kernels compile on a GPU for a first shape, and then for other batch sizes and numbers of tokens.

    PYTHONPATH=. python tests/kernels/compilations.py    # JSON lines: case, compiled for the first shape, for others

A process of its own: what another test has compiled there would not be compiled again.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from tests.kernels.cases import Case, run

BF16 = torch.bfloat16
# The Gluon kernels take the first, those for half precision the second, the general ones the third.
KINDS = [
    ("lowrank", BF16, 4),
    ("lowrank", BF16, 3),
    ("lowrank", torch.float32, 4),
    ("headwise", BF16, 4),
    ("static", BF16, 4),
]
OTHER_SHAPES = [(1, 1), (3, 2), (1, 16), (2, 777), (5, 1024), (1, 4097)]


def call(case: Case) -> None:
    run(case, case.inputs(), case.output_gradient(), "triton")


def report(device: torch.device) -> Iterator[dict[str, Any]]:
    compiled: list[Any] = []
    triton.knobs.compilation.listener = lambda **event: compiled.append(event["src"])
    for (mode, dtype, kernel_size), positions in itertools.product(KINDS, ["none", "packed"]):
        case = Case(mode, 2, 512, 256, kernel_size, heads=16, dtype=dtype, parameter_dtype=dtype, positions=positions)
        case = replace(case, device=device)
        compiled.clear()
        call(case)
        first = len(compiled)
        for batch, tokens in OTHER_SHAPES:
            call(replace(case, batch=batch, tokens=tokens))
        name = f"{mode} {dtype} W{kernel_size} positions {positions}"
        yield {"case": name, "first": first, "others": len(compiled) - first}


if __name__ == "__main__":
    for row in report(torch.device("cuda")):
        print(json.dumps(row))
