"""The decode kernel spills no registers and fits into the shared memory of small GPUs: read from what is compiled."""

from . import decode_artefacts
from .processes import rows_of

# Compute capability 8.6 and 8.9, for one block.
SHARED_MEMORY = 101376


def test_nothing_spills_and_everything_fits() -> None:
    found = rows_of("decode_artefacts.py")
    assert len(found) == len(decode_artefacts.CASES)
    assert not [row for row in found if row["spilled"] or row["shared"] > SHARED_MEMORY]
