"""Without a GPU the kernels run in Triton's interpreter, which must be asked for before Triton is imported.

How many random cases: the environment variable DYNCONV_CASES, for instance

    DYNCONV_CASES=500 pytest tests/kernels/test_against_reference.py     # in the interpreter: an hour
    DYNCONV_CASES=2000 pytest tests/kernels/test_against_reference.py    # on a GPU: minutes
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "kernels",
    max_examples=int(os.environ.get("DYNCONV_CASES", "6")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
