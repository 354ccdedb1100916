"""What has been compiled for one batch size and number of tokens serves all others."""

import pytest

from .processes import rows_of


def test_batches_and_tokens_are_not_specialised_on() -> None:
    found = rows_of("specializations.py")
    assert not [row for row in found if row["one"] == 0 or row["all"] != row["one"]]


@pytest.mark.gpu
def test_other_batches_and_tokens_compile_nothing() -> None:
    # That the first shape compiles something shows that somebody listens.
    assert not [row for row in rows_of("compilations.py") if row["first"] == 0 or row["others"]]
