"""How results look in a terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["show_findings", "show_report", "show_retrofit"]


def show_retrofit(result: dict[str, Any]) -> None:
    """What `dynconv retrofit` made."""
    share = result["conv_parameters"] / result["parameters"]
    console = _console()
    console.print(f"[bold green]Made[/] {escape(result['destination'])} in {result['seconds']:.1f} s")
    console.print(
        f"{_count(result['parameters'])} parameters, {_count(result['conv_parameters'])} ({share:.2%}) of them new "
        "in convolutions"
    )


def show_report(report: dict[str, Any]) -> None:
    """What `dynconv inspect` found."""
    console = _console()
    convs = report["convolutions"]
    facts = _table()
    facts.add_column("", style="bold")
    facts.add_column("")
    facts.add_row("Checkpoint", escape(report["checkpoint"]))
    facts.add_row("Architecture", f"{report['architecture']}, {report['layers']} layers, {report['dtype']}")
    facts.add_row("Targets", ", ".join(convs["targets"]))
    facts.add_row("Convolved layers", "all" if convs["layers"] is None else ", ".join(map(str, convs["layers"])))
    facts.add_row("Filters", _filters(convs))
    console.print(facts)
    console.print(_parts_table(report["parts"]))
    cache = report["cache"]
    console.print(
        f"In generation: {_bytes(cache['key_value_bytes_per_token'])} of keys and values for each token, "
        f"{_bytes(cache['conv_state_bytes_per_sequence'])} of convolution states for each sequence\n"
    )
    console.print(_distance_table(report["distances"]))


def show_findings(findings: dict[str, Any]) -> None:
    """What `dynconv doctor` found."""
    console = _console()
    versions = _table(title="Versions")
    versions.add_column("package")
    versions.add_column("version")
    for package, version in findings["versions"].items():
        versions.add_row(package, version or "[dim]not installed[/]")
    console.print(versions)

    devices = _table(title="Kernels")
    for column in ("device", "dtype", "implementation", "why"):
        devices.add_column(column)
    for row in findings["kernels"]:
        devices.add_row(row["device"], row["dtype"], row["implementation"], row["reason"])
    console.print(devices)

    tests = _table(title="Self-test against the formula in float64")
    for column in ("device", "dtype", "operation", "largest error", ""):
        tests.add_column(column, justify="right" if column == "largest error" else "left")
    for row in findings["self_test"]:
        verdict = "[green]ok[/]" if row["ok"] else f"[bold red]FAILED[/] {escape(row['problem'])}"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        tests.add_row(row["device"], row["dtype"], row["operation"], error, verdict)
    console.print(tests)
    console.print("[bold green]All is well[/]" if findings["healthy"] else "[bold red]Something is wrong[/]")


def _console() -> Console:
    return Console(highlight=False)


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, show_header=title is not None)


def _filters(convs: dict[str, Any]) -> str:
    size = {"lowrank": f", rank {convs['rank']}", "headwise": f", {convs['head_size']} channels a head", "static": ""}
    parts = [f"{convs['mode']}{size[convs['mode']]}", f"{convs['kernel_size']} taps"]
    if convs["mode"] != "static":
        parts.append("with a static filter" if convs["static"] else "without a static filter")
    parts.append("residual" if convs["residual"] else "no residual")
    return ", ".join(parts)


def _parts_table(parts: list[dict[str, Any]]) -> Table:
    table = _table(title="Parameters")
    table.add_column("part")
    for column in ("parameters", "share", "memory"):
        table.add_column(column, justify="right")
    total = {key: sum(part[key] for part in parts) for key in ("parameters", "bytes")}
    for part in [*parts, {"part": "total", **total}]:
        share = part["parameters"] / total["parameters"]
        style = "bold" if part["part"] == "total" else None
        table.add_row(part["part"], f"{part['parameters']:,}", f"{share:.2%}", _bytes(part["bytes"]), style=style)
    return table


def _distance_table(distances: list[dict[str, Any]]) -> Table:
    table = _table(title="Distance of the filters from the identity (root mean square)")
    table.add_column("layer", justify="right")
    convs = list(dict.fromkeys(row["conv"] for row in distances))
    for conv in convs:
        table.add_column(conv, justify="right")
    by_layer: dict[int, dict[str, float]] = {}
    for row in distances:
        by_layer.setdefault(row["layer"], {})[row["conv"]] = row["total"]
    for layer, totals in by_layer.items():
        table.add_row(str(layer), *(f"{totals[conv]:.4f}" if conv in totals else "" for conv in convs))
    return table


def _count(number: float) -> str:
    for unit in ("", " K", " M", " B"):
        if number < 1000 or unit == " B":
            return f"{number:.0f}" if unit == "" else f"{number:.2f}{unit}"
        number /= 1000
    raise AssertionError


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError
