"""Python processes of their own: a machine with or without this package, with or without a Hub."""

import os
import site
import subprocess
import sys
import textwrap
import venv
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


def second_environment(folder: Path) -> str:
    """The Python of a new virtual environment that has this one's packages, but for those installed as editable."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    code = "import site; print(site.getsitepackages()[0])"
    packages = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    # Python does not follow what such files name within the directories that this one names.
    (Path(packages) / "packages.pth").write_text("\n".join(site.getsitepackages()))
    return str(python)


def run_python(
    script: str,
    folder: Path,
    *,
    package: bool,
    hub: str | None = None,
    python: str = sys.executable,
    **environment: str,
) -> str:
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
        [python, "-c", prelude + textwrap.dedent(script)],
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
