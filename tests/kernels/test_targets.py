"""The plain Triton kernels compile for GPUs that are not at hand: older ones of NVIDIA, and AMD's."""

import pytest

from .processes import rows_of


# Everything is `python tests/kernels/targets.py`; a run of the tests takes what is trained.
@pytest.mark.parametrize("case", ["one pass packed backward", "static bf16/bf16 W4 static "])
def test_kernels_compile(case: str) -> None:
    found = rows_of("targets.py", case, "sm80", "gfx942")
    assert {row["target"] for row in found} == {"sm80", "gfx942"}
    assert not [row for row in found if row["problem"]]
