"""No kernel reads or writes beside its tensors: in the interpreter, between pages of memory that nobody may touch."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from .processes import run_python

# With a GPU, its own tool looks at what is compiled for it: see sanitize.py.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and compute-sanitizer for it")
SCRIPT = Path(__file__).with_name("guard_pages.py")
READ_BESIDE = """
import ctypes, torch
from tests.kernels.guard_pages import guarded
at_end = {at_end}
tensor = guarded(torch.ones(5), at_end)
ctypes.string_at(tensor.data_ptr() + (20 if at_end else -1), 1)
"""


def python(*arguments: str) -> subprocess.CompletedProcess:
    return run_python(os.environ | {"TRITON_INTERPRET": "1"}, *arguments)


@pytest.mark.parametrize("at_end", [False, True])
def test_reading_beside_a_tensor_ends_the_process(at_end: bool) -> None:
    assert python("-c", READ_BESIDE.format(at_end=at_end)).returncode == -signal.SIGSEGV


@pytest.mark.parametrize("mode", ["lowrank", "headwise", "static"])
def test_kernels_stay_inside_their_tensors(mode: str) -> None:
    result = python(str(SCRIPT), mode, "12")
    last = result.stdout.splitlines()[-1:]
    assert result.returncode == 0, f"{last}\n{result.stderr[-2000:]}"
