"""The commands and their options; what they do is imported when one runs."""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from .errors import check_exists, told_in_one_line

__all__ = ["app", "main"]

app = typer.Typer(
    name="dynconv",
    help="Dynamic short convolutions for Llama checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _targets(text: str) -> str:
    if text == "all-linear":
        return text
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in TARGETS]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(TARGETS)}; all-linear names all of them")
    return ",".join(names)


def _layer_list(text: str) -> str:
    try:
        _layer_indices(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _png_file(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise typer.BadParameter(f"the picture is a PNG file, and its name must end in .png, got {text!r}")
    return Path(text)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
Revision = Annotated[Optional[str], typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.")]  # noqa: UP045
Layers = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="LIST", parser=_layer_list, help="Decoder layers that get them, as in 0,2,8-15.", show_default="all"
    ),
]
Checkpoint = Annotated[str, typer.Argument(help="A directory, or a name on the Hub.", show_default=False)]


@app.callback(invoke_without_command=True)
@told_in_one_line
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed_version

        print(f"dynconv-hf {installed_version('dynconv-hf')}")
        raise typer.Exit


@app.command()
@told_in_one_line
def retrofit(
    source: Annotated[str, typer.Argument(help="A Llama: a directory, or a name on the Hub.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="The directory to make.", show_default=False)],
    targets: Annotated[
        str, typer.Option(metavar="NAMES", parser=_targets, help="Linear layers that get one, or all-linear.")
    ] = "q_proj,k_proj,v_proj",
    mode: Annotated[
        Literal["lowrank", "headwise", "static"], typer.Option(metavar="MODE", help="lowrank, headwise or static.")
    ] = "lowrank",
    kernel_size: Annotated[int, typer.Option(min=1, max=8, metavar="N", help="Taps, from 1 to 8.")] = 4,
    rank: Annotated[int, typer.Option(min=1, metavar="N", help="Basis filters, for lowrank.")] = 15,
    head_size: Annotated[int, typer.Option(min=1, metavar="N", help="Channels sharing a filter, for headwise.")] = 16,
    no_static: Annotated[bool, typer.Option("--no-static", help="Leave out the static filter.")] = False,
    no_residual: Annotated[bool, typer.Option("--no-residual", help="Leave out the residual.")] = False,
    layers: Layers = None,
    init: Annotated[
        Literal["identity", "uniform"], typer.Option(metavar="START", help="identity (equal to the base) or uniform.")
    ] = "identity",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the new parameters.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the base's weights, do not link them.")] = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Give a Llama checkpoint convolutions, without loading it."""
    check_exists(source)
    conv_fields = {
        "conv_targets": targets if targets == "all-linear" else targets.split(","),
        "conv_mode": mode,
        "conv_kernel_size": kernel_size,
        "conv_rank": rank,
        "conv_head_size": head_size,
        "conv_static": not no_static,
        "conv_residual": not no_residual,
        "conv_layers": None if layers is None else _layer_indices(layers),
        "conv_init": init,
    }
    import torch

    from dynconv_hf import retrofit_checkpoint

    from .report import totals
    from .tables import show_retrofit

    started = time.perf_counter()
    torch.manual_seed(seed)
    made = retrofit_checkpoint(source, destination, overwrite=overwrite, copy=copy, revision=revision, **conv_fields)
    result = {"destination": str(made), **totals(made), "seconds": round(time.perf_counter() - started, 2)}
    if as_json:
        _print_json(result)
    else:
        show_retrofit(result)


@app.command()
@told_in_one_line
def inspect(
    checkpoint: Checkpoint,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            parser=_png_file,
            help="Also draw the convolutions, to a PNG file, with matplotlib.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Where parameters and memory go, and how far the convolutions have moved."""
    check_exists(checkpoint)
    from .report import make_report

    if plot is not None:
        from .plot import check_plot_file, draw

        check_plot_file(plot)
    report = make_report(checkpoint, revision=revision)
    if plot is not None:
        draw(report, plot)
    if as_json:
        _print_json(report)
        return
    from .tables import show_report

    show_report(report)


@app.command()
@told_in_one_line
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="X", help="0: always the likeliest.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, metavar="X", help="Nucleus for sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sampling.")] = 0,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Such as cpu or cuda:0.", show_default="GPU if any"),
    ] = None,
    tokenizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="A directory, or a name on the Hub.", show_default="the model's or base's"),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, printing the text as it is made."""
    check_exists(checkpoint)
    if tokenizer is not None:
        check_exists(tokenizer, "tokenizer.json", "tokenizer.model")
    from .generate import continue_prompt

    result = continue_prompt(
        checkpoint,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        device=device,
        tokenizer_name=tokenizer,
        revision=revision,
        stream=not as_json,
    )
    if as_json:
        _print_json(result)


@app.command()
@told_in_one_line
def doctor(as_json: Json = False) -> None:
    """Versions, GPUs, which kernels run and why, and a self-test."""
    from .doctor import examine

    findings = examine()
    if as_json:
        _print_json(findings)
    else:
        from .tables import show_findings

        show_findings(findings)
    if not findings["healthy"]:
        raise typer.Exit(1)


def main() -> None:
    """What the `dynconv` script calls."""
    app()


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


def _layer_indices(text: str) -> list[int]:
    indices = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"must be indices and ranges, as in 0,2,8-15, got {text!r}")
        indices.extend(range(int(first), int(last if dash else first) + 1))
    return indices
