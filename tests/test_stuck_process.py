"""A test that never returns to Python fails by itself: PyTorch can wait for its threads with Python's lock held."""

import subprocess
import sys
from pathlib import Path

STUCK = """
import ctypes

def test_stuck():
    ctypes.PyDLL(None).sleep(600)

def test_after_it():
    pass
"""


def test_a_stuck_test_fails_and_the_others_run(tmp_path: Path) -> None:
    file = tmp_path / "test_stuck.py"
    file.write_text(STUCK)
    settings = ["-c", str(Path(__file__).parents[1] / "pyproject.toml"), "-o", "faulthandler_timeout=2"]
    command = [sys.executable, "-m", "pytest", *settings, "-p", "no:cacheprovider", "--numprocesses", "1", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "crashed while running" in result.stdout
    assert "1 failed, 1 passed" in result.stdout
