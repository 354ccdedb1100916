"""What the reports of the scripts here have in common."""

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import triton


def write_report(path: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
    """JSON: the command, the GPU and the versions that measured, then the settings, then the rows."""
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        **settings,
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
