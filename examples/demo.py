"""The demo, `make demo`: a small Llama gets convolutions, and is trained beside the Llama it was.

Both continue their pretraining on Shakespeare under the same budget: the same rows of text in the same order, the same
number of steps, the same schedule and learning rate. Whatever comes out is printed and plotted.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from continued_pretraining import (
    ConvTrainingArguments,
    DataArguments,
    ModelArguments,
    continue_pretraining,
    load_blocks,
    load_model,
    make_trainer,
    save_loss_curves,
)
from datasets import Dataset
from datasets.utils import logging as datasets_logging
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import dynconv_hf

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "assets" / "stories260K"
TEXT = HERE / "assets" / "shakespeare.txt"
PLAYS_SEPARATOR = "\n\n\n"
PROMPT = "ROMEO.\n"
BLOCK_SIZE = 256
BATCH_SIZE = 8
EVALUATIONS = 5


class QuietProgress(ProgressCallback):
    """One bar for the training: what is logged and evaluated goes into the table and the plot."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        pass


class StepTimer(TrainerCallback):
    """Times the optimizer steps, without the evaluations between them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    # Two threads are faster for a model this small on an idle machine, and many times slower on a busy one, where each
    # step waits for the slower of them.
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    console.rule("A retrofitted model starts as its base")
    show_same_logits(tokenizer, console)

    directory = new_directory(arguments.output_dir)
    data = DataArguments(
        text_file=str(TEXT), document_separator=PLAYS_SEPARATOR, block_size=BLOCK_SIZE, validation_split_percentage=5
    )
    blocks = load_blocks(data, tokenizer, model_length=BLOCK_SIZE)
    console.rule("Both continue their pretraining on Shakespeare")
    console.print(
        f"{arguments.steps} steps of {BATCH_SIZE} rows of {BLOCK_SIZE} tokens, learning rate "
        f"{arguments.learning_rate:g}, {len(blocks[1])} rows held out"
    )
    runs = {
        name: train(name, with_convs, tokenizer, blocks, arguments, directory / folder, console)
        for name, folder, with_convs in (("Llama", "llama", False), ("Llama with convolutions", "dynconv", True))
    }
    report(runs, arguments, directory, console)

    console.rule("Saved, loaded again, and asked to go on")
    for name, run in runs.items():
        console.print(f"[bold]{name}[/bold]")
        console.print(generate(run["folder"], tokenizer), markup=False, highlight=False)
        console.print()
    console.print(f"The models, the table and the plot are in {directory}", soft_wrap=True, highlight=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive_int, default=200, help="of training, for each model (default: 200)")
    parser.add_argument(
        "--learning_rate", type=float, default=3e-3, help="peak, for all weights of both models (default: 0.003)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new filters and the order of rows (default: 0)")
    parser.add_argument(
        "--output_dir", type=Path, default=HERE.parent / "runs", help="gets a new folder for each run (default: runs)"
    )
    return parser.parse_args()


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def new_directory(parent: Path) -> Path:
    """The first of demo-1, demo-2, ... that is not there: the results of earlier runs stay."""
    number = 1
    while True:
        directory = parent / f"demo-{number}"
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return directory


def show_same_logits(tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    ids = tokenizer(TEXT.read_text(encoding="utf-8")[:2000], return_tensors="pt")["input_ids"][:, :BLOCK_SIZE]
    for implementation in ("eager", "sdpa"):
        base = AutoModelForCausalLM.from_pretrained(CHECKPOINT, attn_implementation=implementation)
        retrofitted = dynconv_hf.retrofit(CHECKPOINT, attn_implementation=implementation)
        with torch.no_grad():
            logits, new_logits = base(ids).logits, retrofitted(ids).logits
        if not torch.equal(logits, new_logits):
            difference = (logits - new_logits).abs().max().item()
            raise SystemExit(f"error: with {implementation} attention the logits differ by up to {difference}")
        console.print(f"{implementation} attention: {logits.numel():,} logits, all equal bit for bit")


def train(
    name: str,
    with_convs: bool,
    tokenizer: PreTrainedTokenizerBase,
    blocks: tuple[Dataset, Dataset],
    arguments: argparse.Namespace,
    folder: Path,
    console: Console,
) -> dict[str, Any]:
    console.print(name)
    set_seed(arguments.seed)
    model = load_model(ModelArguments(model_name_or_path=str(CHECKPOINT), retrofit=with_convs))
    timer = StepTimer()
    # A bar in a log file would be a line for every step.
    callbacks = [timer, QuietProgress()] if console.is_terminal else [timer]
    trainer = make_trainer(model, tokenizer, blocks, training_arguments(arguments, folder), callbacks)
    trainer.remove_callback(PrinterCallback)
    continue_pretraining(trainer)
    return {"folder": folder, "model": model, "history": trainer.state.log_history, "seconds": timer.seconds}


def training_arguments(arguments: argparse.Namespace, folder: Path) -> ConvTrainingArguments:
    return ConvTrainingArguments(
        output_dir=str(folder),
        max_steps=arguments.steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=BATCH_SIZE,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 10,
        weight_decay=0.1,
        seed=arguments.seed,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=max(arguments.steps // EVALUATIONS, 1),
        eval_on_start=True,
        save_strategy="no",
        # QuietProgress instead of the callback that prints every log.
        disable_tqdm=True,
    )


def report(runs: dict[str, dict[str, Any]], arguments: argparse.Namespace, directory: Path, console: Console) -> None:
    """Prints the table; leaves it, the curves and the numbers of both in `directory`."""
    results = {name: summarize(run) for name, run in runs.items()}
    table = Table("", "Llama", "Llama with convolutions", box=box.MARKDOWN)
    for label, key, style in (
        ("parameters", "parameters", ",d"),
        ("held-out loss before", "loss_before", ".4f"),
        ("held-out loss after", "loss_after", ".4f"),
        ("seconds a step (median)", "seconds_per_step", ".3f"),
    ):
        table.add_row(label, *(format(result[key], style) for result in results.values()))
    console.print(table)
    with (directory / "table.md").open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(table)
    settings = {"steps": arguments.steps, "learning_rate": arguments.learning_rate, "seed": arguments.seed}
    text = json.dumps({"settings": settings, "results": results}, indent=2)
    (directory / "results.json").write_text(text + "\n", encoding="utf-8")
    save_loss_curves({name: run["history"] for name, run in runs.items()}, directory)


def summarize(run: dict[str, Any]) -> dict[str, float]:
    losses = [entry["eval_loss"] for entry in run["history"] if "eval_loss" in entry]
    return {
        "parameters": run["model"].num_parameters(),
        "loss_before": losses[0],
        "loss_after": losses[-1],
        "seconds_per_step": statistics.median(run["seconds"]),
    }


def generate(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    # The same draws for both models, and in every run.
    set_seed(0)
    output = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.7)
    return tokenizer.decode(output[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
