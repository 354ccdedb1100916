"""`dynconv inspect --plot`."""

import errno
from pathlib import Path
from typing import Any

__all__ = ["check_plot_file", "draw"]

PNG_SIGNATURE = b"\x89PNG"


def check_plot_file(path: Path) -> None:
    """Refuses to overwrite what is no picture."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(path.parent))
    if path.exists() and path.open("rb").read(4) != PNG_SIGNATURE:
        raise FileExistsError(errno.EEXIST, "--plot would overwrite a file that is not a picture", str(path))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None


def draw(report: dict[str, Any], path: Path) -> None:
    """Distance from the identity over layers, a line for each target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for conv in dict.fromkeys(row["conv"] for row in report["distances"]):
        rows = [row for row in report["distances"] if row["conv"] == conv]
        axes.plot([row["layer"] for row in rows], [row["total"] for row in rows], marker="o", markersize=3, label=conv)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("distance of the filter from the identity (rms)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
