"""The examples where what they need besides the package is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("example", "absent", "extra"),
    [
        ("continued_pretraining", "matplotlib", "demo"),
        ("demo", "datasets", "demo"),
        ("sft_lora", "trl", "trl"),
    ],
)
def test_the_extra_is_named(example, absent, extra):
    """Even where only help is asked for. What None stands for in sys.modules cannot be imported."""
    path = EXAMPLES / f"{example}.py"
    code = (
        f"import runpy, sys\nsys.path.insert(0, {str(EXAMPLES)!r})\nsys.modules[{absent!r}] = None\n"
        f"sys.argv = ['{path.name}', '--help']\nrunpy.run_path({str(path)!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and run.stdout == ""
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"error: this example needs {absent}") and f"pip install '.[{extra}]'" in last
    assert "Traceback" not in run.stderr
