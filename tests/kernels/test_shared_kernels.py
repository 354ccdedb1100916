"""What has been compiled for one batch size and number of tokens serves all others."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from .cases import Case, run
from .processes import rows_of

BF16 = torch.bfloat16


def call(case: Case) -> None:
    run(case, case.inputs(), case.output_gradient(), "triton")


def test_batches_and_tokens_are_not_specialised_on() -> None:
    found = rows_of("specializations.py")
    assert not [row for row in found if row["one"] == 0 or row["all"] != row["one"]]


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["none", "packed"])
@pytest.mark.parametrize(
    ("mode", "dtype", "kernel_size"),
    # The Gluon kernels take the first, those for half precision the second, the general ones the third.
    [
        ("lowrank", BF16, 4),
        ("lowrank", BF16, 3),
        ("lowrank", torch.float32, 4),
        ("headwise", BF16, 4),
        ("static", BF16, 4),
    ],
    ids=str,
)
def test_other_batches_and_tokens_compile_nothing(
    mode: str,
    dtype: torch.dtype,
    kernel_size: int,
    positions: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import triton

    first = Case(mode, 2, 512, 256, kernel_size, heads=16, dtype=dtype, parameter_dtype=dtype, positions=positions)
    first = replace(first, device=device)
    call(first)
    compiled: list[Any] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **event: compiled.append(event["src"]))
    for batch, tokens in [(1, 1), (3, 2), (1, 16), (2, 777), (5, 1024), (1, 4097)]:
        call(replace(first, batch=batch, tokens=tokens))
    assert compiled == []

    # Another kernel size does: the list is not empty because nobody listens.
    call(replace(first, kernel_size=2))
    assert compiled
