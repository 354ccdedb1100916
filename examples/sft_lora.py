"""Fine-tunes a Llama on prompts and completions: LoRA on its linear layers, dynamic short convolutions in full.

    OMP_NUM_THREADS=1 python examples/sft_lora.py \\
        --model_name_or_path examples/assets/stories260K \\
        --text_file examples/assets/shakespeare.txt --max_examples 1000 \\
        --output_dir runs/sft --max_steps 60 --max_length 128 --per_device_train_batch_size 4 \\
        --learning_rate 3e-3 --conv_learning_rate 1e-2

Every argument of `trl.SFTConfig` works too, and so does `accelerate launch` in place of `python`. `--help` lists them
all. The output directory then holds the adapter, LoRA and convolutions, which `dynconv_hf.load_lora` puts back onto
the base. Examples are packed into full rows, in which none sees another.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from dynconv_hf import lora_config

# Before the other example is imported, which would name an extra that is too small for this one.
try:
    from datasets import Dataset, load_dataset
    from trl import SFTConfig, SFTTrainer, TrlParser
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: this example needs {error.name}, as in: pip install '.[trl]' (Python 3.11 or newer)"
    ) from None

from continued_pretraining import (
    ConvTrainer,
    ModelArguments,
    checkpoint_to_resume,
    leave_process_group,
    load_model,
)

COLUMNS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"text"})


@dataclass
class LoraArguments:
    """The adapter of the linear layers, and how the base below it is stored."""

    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale, over the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers with an adapter; by default all but the head."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Base in 4 bits (NF4), with bitsandbytes."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Base in 8 bits, with bitsandbytes."})


@dataclass
class DataArguments:
    """What the model is fine-tuned on: one of a text, a JSON file, and a dataset."""

    text_file: str | None = field(
        default=None, metadata={"help": "A text, UTF-8: each paragraph is the prompt for the one after it."}
    )
    json_file: str | None = field(
        default=None, metadata={"help": "JSON lines, with `prompt` and `completion`, `messages`, or `text`."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A `datasets` name, with the same columns."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset, as in `train[:10%]`."})
    max_examples: int | None = field(default=None, metadata={"help": "Take the first examples only."})


@dataclass
class ConvSFTConfig(SFTConfig):
    """SFTConfig, packing by default, and a learning rate for the convolutions."""

    packing: bool = field(default=True, metadata={"help": "Fill rows with several examples, kept apart."})
    conv_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the convolutions; if left out, that of the adapter."}
    )

    def __post_init__(self) -> None:
        has_accelerator = torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = has_accelerator and not self.fp16
        super().__post_init__()
        # Pinning does nothing without an accelerator, but warns about it for every loader.
        self.dataloader_pin_memory = self.dataloader_pin_memory and has_accelerator
        if self.packing and self.packing_strategy == "wrapped":
            raise ValueError(
                "--packing_strategy wrapped cuts examples without a mark, so that they would see each other: "
                "choose bfd or bfd_split"
            )


class ConvSFTTrainer(ConvTrainer, SFTTrainer):
    """An SFTTrainer whose optimizer treats the convolutions as a group of their own."""


def quantization(arguments: LoraArguments, compute_dtype: str) -> dict[str, Any]:
    """The argument of `from_pretrained` that stores the base in few bits, if that was asked for."""
    if arguments.load_in_4bit and arguments.load_in_8bit:
        raise ValueError("give either --load_in_4bit or --load_in_8bit, got both")
    if arguments.load_in_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if not arguments.load_in_4bit:
        return {}
    four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    if compute_dtype != "auto":
        four_bit["bnb_4bit_compute_dtype"] = compute_dtype
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four_bit)}


def load_examples(arguments: DataArguments) -> Dataset:
    """One row for each example, with columns that SFTTrainer knows."""
    sources = {name: getattr(arguments, name) for name in ("text_file", "json_file", "dataset_name")}
    given = {name: value for name, value in sources.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give one of --text_file, --json_file and --dataset_name, got {given or 'none'}")
    if arguments.max_examples is not None and arguments.max_examples < 1:
        raise ValueError(f"--max_examples must be at least 1, got {arguments.max_examples}")
    for name in ("text_file", "json_file"):
        if name in given and not Path(given[name]).is_file():
            raise ValueError(f"--{name} {given[name]!r} is not a file")
    if arguments.text_file is not None:
        examples = paragraph_pairs(Path(arguments.text_file).read_text(encoding="utf-8"))
    elif arguments.json_file is not None:
        examples = load_dataset("json", data_files=arguments.json_file, split="train")
    else:
        examples = load_dataset(arguments.dataset_name, arguments.dataset_config_name, split=arguments.dataset_split)
    if not any(columns <= set(examples.column_names) for columns in COLUMNS):
        raise ValueError(
            f"the examples need `prompt` and `completion`, `messages`, or `text`; they have {examples.column_names}"
        )
    return examples if arguments.max_examples is None else examples.take(min(arguments.max_examples, len(examples)))


def paragraph_pairs(text: str) -> Dataset:
    """Each paragraph as the prompt for the next; in a play, a line and its reply."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
    if len(paragraphs) < 2:
        raise ValueError(f"the text has {len(paragraphs)} paragraphs, too few for a prompt and its completion")
    return Dataset.from_list([{"prompt": f"{first}\n\n", "completion": then} for first, then in pairwise(paragraphs)])


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    arguments: ConvSFTConfig,
    lora: LoraArguments,
) -> ConvSFTTrainer:
    """An SFTTrainer that adds the adapter to the model."""
    options = {"r": lora.lora_r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout}
    if lora.lora_target_modules is not None:
        options["target_modules"] = lora.lora_target_modules
    return ConvSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=lora_config(model, **options),
    )


def main() -> None:
    parser = TrlParser((ModelArguments, LoraArguments, DataArguments, ConvSFTConfig), description=__doc__)
    try:
        model_arguments, lora_arguments, data_arguments, training_arguments = parser.parse_args_and_config()
        checkpoint = checkpoint_to_resume(training_arguments)
        # The filter projections of new convolutions, and the adapter, are drawn at random.
        set_seed(training_arguments.seed)
        examples = load_examples(data_arguments)
        model = load_model(model_arguments, **quantization(lora_arguments, model_arguments.dtype))
        tokenizer = AutoTokenizer.from_pretrained(
            model_arguments.model_name_or_path, revision=model_arguments.revision or "main"
        )
        trainer = make_trainer(model, tokenizer, examples, training_arguments, lora_arguments)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"The adapter is in {training_arguments.output_dir}: dynconv_hf.load_lora() puts it onto its base")


if __name__ == "__main__":
    main()
    leave_process_group()
