"""No kernel spills registers on sm_90, and loops fetch ahead: read from what is compiled, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("artefacts.py")


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
    # Compiling needs kernels that are not interpreted: a process of its own.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path.cwd()), environment.get("PYTHONPATH"))))
    command = [sys.executable, str(SCRIPT), wanted]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found
    assert not [row for row in found if row["spilled"]]
    # Triton may find a loop that it does not do that to: see `carry` in direct_tiles.
    assert not [row for row in found if row["kernel"].startswith("direct_") and not row["fetched_ahead"]]
