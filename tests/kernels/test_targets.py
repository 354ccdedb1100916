"""The plain Triton kernels compile for GPUs that are not at hand: older ones of NVIDIA, and AMD's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# Everything is `python tests/kernels/targets.py`; a run of the tests takes what is trained.
@pytest.mark.parametrize("case", ["one pass packed backward", "static bf16/bf16 W4 static "])
def test_kernels_compile(case: str) -> None:
    # Compiling needs kernels that are not interpreted: a process of its own.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(Path(__file__).with_name("targets.py")), case, "sm80", "gfx942"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["target"] for row in found} == {"sm80", "gfx942"}
    assert not [row for row in found if row["problem"]]
