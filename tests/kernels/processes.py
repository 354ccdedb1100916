"""Processes of their own for tests: kernels that are to be compiled must not be interpreted, as those here are."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def run_python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    """Python in a process of its own that finds this repository's packages."""
    path = os.pathsep.join(filter(None, (str(FOLDER.parents[1]), environment.get("PYTHONPATH"))))
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)


def rows_of(script: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON lines that a script of this folder prints, at least one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = run_python(environment, str(FOLDER / script), *arguments)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows
    return rows
