"""Prints the oldest versions that setup.cfg promises, for pip: `python tests/oldest.py [name==version ...]`.

Arguments replace the pins of the same names; Triton comes with PyTorch, which pins it.
"""

import configparser
import sys
from pathlib import Path


def oldest(setup_cfg: Path) -> dict[str, str]:
    """The lower bound of each requirement of the package."""
    config = configparser.ConfigParser()
    config.read(setup_cfg)
    bounds = {}
    for line in config["options"]["install_requires"].strip().splitlines():
        name, _, bound = line.partition(";")[0].partition(">=")
        bounds[name.strip()] = bound.partition(",")[0].strip()
    return {name: bound for name, bound in bounds.items() if name != "triton"}


if __name__ == "__main__":
    pins = oldest(Path(__file__).parents[1] / "setup.cfg")
    pins |= dict(argument.split("==") for argument in sys.argv[1:])
    print(*(f"{name}=={version}" for name, version in pins.items()))
