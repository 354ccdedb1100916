"""Plots what the other scripts here measured.

    python benchmarks/plot.py kernels.json
    python benchmarks/plot.py training_step.json training_step_compiled.json --out training_step.png

Reports of one script go into one figure.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Report = dict[str, Any]


def draw_bars(axis: Axes, values: dict[str, dict[str, float]], groups: Sequence[str], label: str, size: int) -> None:
    """A bar for each name and group, from values[name][group]; nothing where there is none."""
    width = 0.8 / len(values)
    for i, (name, of_group) in enumerate(values.items()):
        heights = [of_group.get(group, math.nan) for group in groups]
        bars = axis.bar([g + i * width for g in range(len(groups))], heights, width, label=name)
        axis.bar_label(bars, fmt=label, fontsize=size, rotation=90, padding=2)
    axis.set_xticks([g + 0.4 - width / 2 for g in range(len(groups))], groups, fontsize=8)
    axis.margins(y=0.15)


def collect(rows: Sequence[Report], name: str, group: str, value: str) -> dict[str, dict[str, float]]:
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        values.setdefault(row[name], {})[row[group]] = row[value]
    return values


def plot_kernels(reports: Sequence[Report]) -> Figure:
    if len(reports) > 1:
        raise SystemExit(f"one report of kernel_speed.py or lowrank_shapes.py at a time, got {len(reports)}")
    figure, axes = plt.subplots(1, 2, figsize=(17, 6), sharey=True, layout="constrained")
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        rows = []
        for row in reports[0]["rows"]:
            if row["direction"] == direction:
                size = "" if row["head_size"] is None else f"\n{row['head_size']} channels"
                rows.append(row | {"group": row["mode"].replace(", ", "\n") + size})
        groups = list(dict.fromkeys(row["group"] for row in rows))
        draw_bars(axis, collect(rows, "implementation", "group", "ratio"), groups, "%.2f", 6)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_title(f"{direction}: time / moving the same bytes")
    return figure


def plot_training_steps(reports: Sequence[Report]) -> Figure:
    rows = []
    for report in reports:
        kv_heads, way = report["sizes"]["num_key_value_heads"], "compiled" if report["shape"]["compile"] else "eager"
        rows += [row | {"group": f"{way}, {kv_heads} key/value heads"} for row in report["rows"]]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    draw_bars(axes[0], collect(rows, "model", "group", "time_ratio"), groups, "%.3f", 8)
    axes[0].axhline(1.0, color="black", linewidth=0.8)
    axes[0].set_title("training step: time / plain Llama")
    draw_bars(axes[1], collect(rows, "model", "group", "peak_gib"), groups, "%.1f", 8)
    axes[1].set_title("training step: peak memory, GiB")
    return figure


def plot_decoding(reports: Sequence[Report]) -> Figure:
    rows = [row | {"group": f"{row['way']}, batch {row['batch']}"} for report in reports for row in report["rows"]]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    draw_bars(axes[0], collect(rows, "model", "group", "time_ratio"), groups, "%.3f", 8)
    axes[0].set_title("a token, from one to the next: time / plain Llama")
    draw_bars(axes[1], collect(rows, "model", "group", "device_ratio"), groups, "%.3f", 8)
    axes[1].set_title("a token, its kernels alone: time / plain Llama")
    for axis in axes:
        axis.axhline(1.0, color="black", linewidth=0.8)
    return figure


# What a row of each script's report has, and no other's.
PLOTS = {"direction": plot_kernels, "step_ms": plot_training_steps, "token_ms": plot_decoding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="by default the first report's path, as .png")
    args = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in args.reports]
    kinds = {kind for kind in PLOTS for report in reports if kind in report["rows"][0]}
    if len(kinds) != 1 or not all(kinds <= report["rows"][0].keys() for report in reports):
        names = ", ".join(str(path) for path in args.reports)
        scripts = "kernel_speed.py, lowrank_shapes.py, training_step.py or decoding.py"
        raise SystemExit(f"reports of one script, of {scripts}, got {names}")
    figure = PLOTS[kinds.pop()](reports)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"{reports[0]['gpu']}, torch {reports[0]['torch']}, triton {reports[0]['triton']}")
    figure.savefig(args.out or args.reports[0].with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
