"""The decode kernel spills no registers and fits into the shared memory of small GPUs: read from what is compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

from . import decode_artefacts

# Compute capability 8.6 and 8.9, for one block.
SHARED_MEMORY = 101376


def test_nothing_spills_and_everything_fits() -> None:
    # Compiling needs kernels that are not interpreted: a process of its own.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path.cwd()), environment.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).with_name("decode_artefacts.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(decode_artefacts.CASES)
    assert not [row for row in found if row["spilled"] or row["shared"] > SHARED_MEMORY]
