"""Continues the pretraining of a Llama on a text, with or without dynamic short convolutions.

    python examples/continued_pretraining.py \\
        --model_name_or_path examples/assets/stories260K \\
        --text_file examples/assets/shakespeare.txt \\
        --output_dir runs/shakespeare \\
        --max_steps 200 --learning_rate 1e-3 --conv_learning_rate 3e-3

Every argument of `transformers.TrainingArguments` works too, and so does `accelerate launch` in place of `python`.
`--help` lists them all. The output directory then holds the model and its tokenizer, the checkpoints, the metrics, and
the losses as `loss_curves.json` and `loss_curves.png`.
"""

import gc
import json
import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.optim import Optimizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from dynconv_hf import DynConvLlamaConfig, freeze_base, parameter_groups, retrofit
from dynconv_hf.checkpoint_files import check_is_there

try:
    from datasets import Dataset, load_dataset
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise SystemExit(f"error: this example needs {error.name}, as in: pip install '.[demo]'") from None

DEFAULT_BLOCK_SIZE = 1024


@dataclass
class ModelArguments:
    """Which model is trained, and where its convolutions sit. A `conv_*` field left out takes retrofit()'s default."""

    model_name_or_path: str = field(metadata={"help": "Hub name or local path of the model."})
    retrofit: bool = field(
        default=True,
        metadata={
            "help": "Give the model, a Llama, dynamic short convolutions first. `--retrofit false` trains it as it "
            "is: a model that has them already, or a plain Llama to compare with."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights: float32, bfloat16, or auto. Mixed precision is `--bf16` with float32."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    conv_targets: list[str] | None = field(
        default=None, metadata={"help": "Linear layers followed by a convolution (q_proj k_proj ...), or all-linear."}
    )
    conv_mode: str | None = field(default=None, metadata={"help": "lowrank, headwise or static."})
    conv_kernel_size: int | None = field(default=None, metadata={"help": "Taps, from 1 to 8."})
    conv_rank: int | None = field(default=None, metadata={"help": "Basis filters of the mode lowrank."})
    conv_head_size: int | None = field(
        default=None, metadata={"help": "Channels that share a filter in the mode headwise."}
    )
    conv_static: bool | None = field(default=None, metadata={"help": "Add a static filter."})
    conv_residual: bool | None = field(default=None, metadata={"help": "Add the input of the convolution."})
    conv_layers: list[int] | None = field(default=None, metadata={"help": "Decoder layers with convolutions."})
    conv_init: str | None = field(default=None, metadata={"help": "identity (starts as the base) or uniform."})

    def conv_fields(self) -> dict[str, Any]:
        """The convolution fields that were given, as retrofit() takes them."""
        given = {name: value for name, value in vars(self).items() if name.startswith("conv_") and value is not None}
        if given.get("conv_targets") == ["all-linear"]:
            given["conv_targets"] = "all-linear"
        return given


@dataclass
class DataArguments:
    """Which text the model is trained on, and how it is cut."""

    text_file: str | None = field(default=None, metadata={"help": "A local text file, UTF-8."})
    document_separator: str | None = field(
        default=None,
        metadata={"help": "What stands between the documents of the text file; if left out, it is one document."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Instead of a text file: a `datasets` name."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset, as in `train[:10%]`."})
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    append_eos: bool = field(
        default=False,
        metadata={
            "help": "End each document with the tokenizer's EOS, besides the special tokens that it adds by itself. "
            "A tokenizer that adds none gets EOS in any case."
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": f"Tokens in a row; by default {DEFAULT_BLOCK_SIZE}, or what the model can take if less."},
    )
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "The last blocks of the text, held out for evaluation; 0 for none."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})


@dataclass
class ConvTrainingArguments(TrainingArguments):
    """TrainingArguments, and how the convolutions are trained."""

    conv_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the convolutions; if left out, that of the other weights."}
    )
    freeze_base: bool = field(default=False, metadata={"help": "Train the convolutions only."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # Pinning does nothing without an accelerator, but warns about it for every loader.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


class ConvTrainer(Trainer):
    """A Trainer whose optimizer treats the convolutions as a group of their own."""

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            opt_model = self.model if model is None else model
            optimizer_cls, options = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            own_groups = {"params", "model", "optimizer_dict"} & options.keys()
            if own_groups:
                raise ValueError(f"--optim {self.args.optim} makes its own parameter groups: choose another optimizer")
            options["params"] = parameter_groups(
                opt_model,
                learning_rate=self.args.learning_rate,
                conv_learning_rate=self.args.conv_learning_rate,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer_cls_and_kwargs = optimizer_cls, options
        return super().create_optimizer(model)


def load_model(arguments: ModelArguments, **extra_options: Any) -> PreTrainedModel:
    """The model to train: retrofitted, or as its checkpoint has it."""
    name = arguments.model_name_or_path
    options = {"revision": arguments.revision, "attn_implementation": arguments.attn_implementation}
    options = {key: value for key, value in options.items() if value is not None}
    options |= {"dtype": arguments.dtype, **extra_options}
    conv_fields = arguments.conv_fields()
    check_is_there(name)
    if not arguments.retrofit:
        if conv_fields:
            raise ValueError(f"--retrofit false trains {name} as it is, but {sorted(conv_fields)} were given")
        return AutoModelForCausalLM.from_pretrained(name, **options)
    config = AutoConfig.from_pretrained(name, revision=arguments.revision)
    if config.model_type == DynConvLlamaConfig.model_type:
        raise ValueError(f"{name} already has dynamic short convolutions: train it with --retrofit false")
    return retrofit(name, **conv_fields, **options)


def load_blocks(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, model_length: int
) -> tuple[Dataset, Dataset | None]:
    """The text as rows of `block_size` tokens: those to train on, and those held out."""
    block_size = arguments.block_size
    if block_size is None:
        block_size = min(DEFAULT_BLOCK_SIZE, model_length)
    if not 2 <= block_size <= model_length:
        raise ValueError(f"--block_size must be from 2 to {model_length}, the length of the model; got {block_size}")
    percentage = arguments.validation_split_percentage
    if not 0 <= percentage < 100:
        raise ValueError(f"--validation_split_percentage must be at least 0 and less than 100, got {percentage}")
    documents = load_documents(arguments)
    tokens = tokenize(documents, tokenizer, arguments.append_eos, arguments.preprocessing_num_workers)
    blocks = pack(tokens, block_size, arguments.preprocessing_num_workers)
    held_out = math.ceil(len(blocks) * percentage / 100)
    if len(blocks) - held_out < 1:
        raise ValueError(
            f"the text gives {len(blocks)} blocks of {block_size} tokens, too few to train on with "
            f"{percentage}% held out: give more text or a smaller --block_size"
        )
    if held_out == 0:
        return blocks, None
    # Neighbouring blocks may hold two halves of one sentence: the held-out ones are taken from the end, not from
    # between those that are trained on.
    parts = blocks.train_test_split(test_size=held_out, shuffle=False)
    return parts["train"], parts["test"]


def load_documents(arguments: DataArguments) -> Dataset:
    """One row for each document, with one column, "text"."""
    if (arguments.text_file is None) == (arguments.dataset_name is None):
        raise ValueError(
            "give either --text_file or --dataset_name, "
            f"got {arguments.text_file!r} for the one and {arguments.dataset_name!r} for the other"
        )
    if arguments.text_file is not None:
        return load_text_file(arguments.text_file, arguments.document_separator)
    dataset = load_dataset(arguments.dataset_name, arguments.dataset_config_name, split=arguments.dataset_split)
    if arguments.text_column not in dataset.column_names:
        raise ValueError(
            f"--text_column {arguments.text_column!r} is not a column of {arguments.dataset_name}, "
            f"which has {dataset.column_names}"
        )
    return dataset.select_columns(arguments.text_column).rename_columns({arguments.text_column: "text"})


def load_text_file(path: str, separator: str | None) -> Dataset:
    if not Path(path).is_file():
        raise ValueError(f"--text_file {path!r} is not a file")
    if separator == "":
        raise ValueError("--document_separator must not be empty, got ''")
    documents = load_dataset("text", data_files=path, sample_by="document", split="train")
    if separator is None:
        return documents

    def split(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        parts = chain.from_iterable(text.split(separator) for text in batch["text"])
        return {"text": [part for part in parts if part.strip()]}

    return documents.map(split, batched=True, desc="Splitting into documents")


def tokenize(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, append_eos: bool, num_workers: int | None
) -> Dataset:
    """Token ids of each document, with the marks between documents that the model knows from its pretraining."""
    # Most Llama tokenizers put BOS in front of a text. One that marks nothing would run documents into each other.
    append_eos = append_eos or not tokenizer("")["input_ids"]
    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no EOS token to end a document with")
    end = [tokenizer.eos_token_id] if append_eos else []

    def tokenize_batch(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # The blocks are made afterwards: a long document is no reason for the tokenizer's warning.
        rows = tokenizer(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": [row + end for row in rows]}

    return documents.map(tokenize_batch, batched=True, remove_columns="text", num_proc=num_workers, desc="Tokenizing")


def pack(tokens: Dataset, block_size: int, num_workers: int | None) -> Dataset:
    """Documents one after the other, cut into blocks; what is left over of each 1,000 documents is dropped."""

    def pack_batch(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        row = list(chain.from_iterable(batch["input_ids"]))
        starts = range(0, len(row) - block_size + 1, block_size)
        blocks = [row[start : start + block_size] for start in starts]
        return {"input_ids": blocks, "labels": blocks}

    return tokens.map(pack_batch, batched=True, num_proc=num_workers, desc=f"Packing into blocks of {block_size}")


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The checkpoint that was asked for; None for a fresh start, which needs an output directory without files."""
    output_dir = Path(arguments.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {str(output_dir)!r} is not a directory")
    holds_files = output_dir.exists() and any(output_dir.iterdir())
    requested = arguments.resume_from_checkpoint
    if requested is None:
        if holds_files:
            raise ValueError(
                f"--output_dir {str(output_dir)!r} already holds files: choose another one, or continue its run with "
                "--resume_from_checkpoint true"
            )
        return None
    if requested.lower() == "true":
        checkpoint = get_last_checkpoint(output_dir) if holds_files else None
        if checkpoint is None:
            raise ValueError(f"--resume_from_checkpoint true: there is no checkpoint in {str(output_dir)!r}")
        return checkpoint
    if not Path(requested).is_dir():
        raise ValueError(f"--resume_from_checkpoint {requested!r} is neither `true` nor the directory of a checkpoint")
    if holds_files and Path(requested).resolve().parent != output_dir.resolve():
        raise ValueError(f"--output_dir {str(output_dir)!r} holds files of a run that {requested!r} is no part of")
    return requested


def check_same_model(config: Any, checkpoint: str) -> None:
    """Trainer loads the weights of a checkpoint that fit and says little of the others: a mix-up is found here."""
    saved = AutoConfig.from_pretrained(checkpoint)
    names = {"model_type", *(name for name in vars(config) if name.startswith("conv_"))} - {"conv_init"}
    for name in sorted(names):
        ours, theirs = getattr(config, name), getattr(saved, name, None)
        if ours != theirs:
            raise ValueError(f"cannot resume from {checkpoint!r}: its {name} is {theirs!r}, but {ours!r} is asked for")


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: tuple[Dataset, Dataset | None],
    arguments: ConvTrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
) -> ConvTrainer:
    """A Trainer for the blocks of `load_blocks`."""
    train_blocks, held_out_blocks = blocks
    return ConvTrainer(
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        eval_dataset=held_out_blocks,
        processing_class=tokenizer,
        # Blocks are full: none of the collators that pad, and take the padding token out of the labels, is wanted.
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def continue_pretraining(trainer: Trainer, checkpoint: str | None = None) -> None:
    """Trains, from a checkpoint if there is one, evaluates, and leaves everything in the output directory."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        metrics["perplexity"] = perplexity(metrics["eval_loss"])
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_loss_curves({"": trainer.state.log_history}, Path(trainer.args.output_dir))


def perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def save_loss_curves(histories: dict[str, list[dict[str, Any]]], directory: Path) -> None:
    """Writes `loss_curves.png`, and `loss_curves.json` with the numbers in it: for each name a Trainer's history."""
    text = json.dumps(histories, indent=2)
    (directory / "loss_curves.json").write_text(text + "\n", encoding="utf-8")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for index, (name, history) in enumerate(histories.items()):
        for key, label, style in (("loss", "training", {"alpha": 0.35}), ("eval_loss", "held out", {"marker": "o"})):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{index}", label=f"{name} {label}".strip(), **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(directory / "loss_curves.png", dpi=120)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, ConvTrainingArguments), description=__doc__)
    model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses()
    try:
        checkpoint = checkpoint_to_resume(training_arguments)
        # The filter projections of new convolutions are drawn at random.
        set_seed(training_arguments.seed)
        model = load_model(model_arguments)
        if checkpoint is not None:
            check_same_model(model.config, checkpoint)
        if training_arguments.freeze_base:
            freeze_base(model)
        tokenizer = AutoTokenizer.from_pretrained(
            model_arguments.model_name_or_path, revision=model_arguments.revision or "main"
        )
        with training_arguments.main_process_first(desc="preparing the text"):
            blocks = load_blocks(data_arguments, tokenizer, model.config.max_position_embeddings)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    trainer = make_trainer(model, tokenizer, blocks, training_arguments)
    continue_pretraining(trainer, checkpoint)
    if trainer.is_world_process_zero():
        print(f"The model, its checkpoints and loss curves are in {training_arguments.output_dir}")


def leave_process_group() -> None:
    """For the end of a script that may have been launched as several processes, when no model is wrapped any more.

    PyTorch's gloo threads run into Python's end otherwise, which now and then aborts a process that has done its work.
    """
    # Were a wrapped model the last to own the group, it would wait for these threads with Python's lock held.
    gc.collect()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
    leave_process_group()
