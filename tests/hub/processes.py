"""Python processes of their own: a machine with or without this package, with or without a Hub."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
WITHOUT_PACKAGE = """
    import sys

    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "dynconv_hf":
                raise ModuleNotFoundError("No module named 'dynconv_hf'")

    sys.meta_path.insert(0, NotInstalled())
"""


def run_python(script: str, folder: Path, *, package: bool, hub: str | None = None, **environment: str) -> str:
    """What `script` prints, in a process that starts in `folder` and keeps all of its caches there.

    package: whether `dynconv_hf` can be imported; hub: the address of the Hub there is, if there is one.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "DYNCONV"))}
    hub_variables = {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_loopback"} if hub else {"HF_HUB_OFFLINE": "1"}
    variables = {
        **kept,
        **hub_variables,
        "HF_HOME": str(folder / ("home" if package else "home_without")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        **({"PYTHONPATH": str(REPOSITORY)} if package else {}),
        **environment,
    }
    prelude = "" if package else textwrap.dedent(WITHOUT_PACKAGE)
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    # transformers would ask whether to run code from the checkpoint.
    assert "custom code" not in done.stdout + done.stderr, f"{done.stdout}\n{done.stderr}"
    return done.stdout
