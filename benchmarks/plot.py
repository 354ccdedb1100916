"""Plots what benchmarks/kernel_speed.py measured: python benchmarks/plot.py kernels.json [kernels.png]"""

import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else source.with_suffix(".png")
    report = json.loads(source.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(17, 6), sharey=True, layout="constrained")
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        rows = [row for row in report["rows"] if row["direction"] == direction]
        groups = list(dict.fromkeys((row["mode"], row["head_size"]) for row in rows))
        names = list(dict.fromkeys(row["implementation"] for row in rows))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            ratios = {(r["mode"], r["head_size"]): r["ratio"] for r in rows if r["implementation"] == name}
            bars = axis.bar(
                [g + i * width for g in range(len(groups))],
                [ratios.get(g, math.nan) for g in groups],
                width,
                label=name,
            )
            axis.bar_label(bars, fmt="%.2f", fontsize=6, rotation=90, padding=2)
        labels = [mode.replace(", ", "\n") + ("" if size is None else f"\n{size} channels") for mode, size in groups]
        axis.set_xticks([g + 0.4 - width / 2 for g in range(len(groups))], labels, fontsize=8)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.margins(y=0.12)
        axis.set_title(f"{direction}: time / moving the same bytes")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"{report['gpu']}, torch {report['torch']}, triton {report['triton']}")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main()
