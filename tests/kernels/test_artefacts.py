"""No kernel spills registers on sm_90, and loops fetch ahead: read from what is compiled, without a GPU."""

import pytest

from .processes import rows_of


# Everything is `python tests/kernels/artefacts.py`; a run of the tests takes what is trained, the longest filters, and
# of the low-rank kernels, whose registers are nearly all in use, every variant.
@pytest.mark.parametrize(
    "wanted",
    [
        "bf16/bf16 W4 static forward",
        "bf16/bf16 W4 static backward",
        "bf16/bf16 W8",
        "lowrank R",
        "one pass",
    ],
)
def test_nothing_spills_and_loads_are_fetched_ahead(wanted: str) -> None:
    found = rows_of("artefacts.py", wanted)
    assert not [row for row in found if row["spilled"]]
    # Triton may find a loop that it does not do that to: see `carry` in direct_tiles.
    assert not [row for row in found if row["kernel"].startswith("direct_") and not row["fetched_ahead"]]
