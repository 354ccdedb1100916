"""The files of a checkpoint, on disk or on the Hub: which there are, and what the weights' headers say."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import parse_local_safetensors_file_metadata, snapshot_download
from safetensors import SafetensorError, safe_open

__all__ = [
    "TensorHeader",
    "check_is_there",
    "companion_files",
    "local_directory",
    "open_shard",
    "read_headers",
    "weight_files",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_PATTERNS = (SINGLE_FILE, "model-*.safetensors", INDEX_FILE)
PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What belongs to a model apart from its config, weights and card.
COMPANION_PATTERNS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


class TensorHeader(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def check_is_there(name_or_path: str | os.PathLike) -> None:
    """Tells of a folder that is missing, which transformers would take for a name on the Hub.

    `dynconv_cli.errors.check_exists` says the same of the same names, before this package is imported.

    Raises:
        FileNotFoundError: what is meant as a folder is not there.
        NotADirectoryError: it is a file.
    """
    name = os.fspath(name_or_path)
    if os.path.isdir(name):
        return
    if os.path.isfile(name):
        raise NotADirectoryError(f"{name!r} is a file; give the folder that it lies in, or a name on the Hub")
    is_written_as_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if is_written_as_path or isinstance(name_or_path, os.PathLike):
        raise FileNotFoundError(f"there is no folder {name!r}; give one that exists, or a name on the Hub")


def local_directory(name_or_path: str | os.PathLike, variant: str | None = None, **hub_arguments: Any) -> Path:
    """The directory itself, or the files of a model on the Hub: its weights and what belongs to them."""
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    weights = WEIGHT_PATTERNS
    if variant is not None:
        weights = (*_names_of_variant(variant), f"model.{variant}-*.safetensors")
    # The card tells the licence.
    patterns = ["config.json", "README.md", *weights, *COMPANION_PATTERNS]
    return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **hub_arguments))


def weight_files(directory: Path, name: str, variant: str | None = None) -> list[Path]:
    """The safetensors files that hold the weights, in order: of the variant "fp16", model.fp16.safetensors.

    Raises:
        FileNotFoundError: there are none, or the index names one that is not there.
        ValueError: the index cannot be read.
    """
    single_file, index_file = _names_of_variant(variant)
    if (directory / single_file).is_file():
        return [directory / single_file]
    if not (directory / index_file).is_file():
        raise FileNotFoundError(_no_safetensors(directory, name, variant))
    names = _files_of_index(directory / index_file)
    missing = [file for file in names if not (directory / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory / index_file} names {missing[0]}, which is not there")
    return [directory / file for file in names]


def companion_files(directory: Path) -> list[Path]:
    """Tokenizer, chat templates, generation config, licence: relative paths of those that are there."""
    found = {path for pattern in COMPANION_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(directory) for path in found)


def read_headers(files: list[Path]) -> dict[str, TensorHeader]:
    """The tensors of some safetensors files by name; no weight is read.

    Raises:
        ValueError: a file is damaged or cut off.
    """
    headers = {}
    for file in files:
        # Opening it checks the header against the length of the file.
        open_shard(file)
        for name, tensor in parse_local_safetensors_file_metadata(file).tensors.items():
            begin, end = tensor.data_offsets
            headers[name] = TensorHeader(file.name, tuple(tensor.shape), tensor.dtype, end - begin)
    return headers


def open_shard(file: Path) -> Any:
    """The tensors of a file, read one by one as they are asked for."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _files_of_index(index: Path) -> list[str]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
    outside = [file for file in files if os.path.basename(file) != file]
    if outside or not files:
        raise ValueError(f"{index} must name files beside it, got {outside or files}")
    return files


def _names_of_variant(variant: str | None) -> tuple[str, str]:
    """What transformers calls the only file of a variant, and the index of several."""
    if variant is None:
        return SINGLE_FILE, INDEX_FILE
    return f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json"


def _no_safetensors(directory: Path, name: str, variant: str | None) -> str:
    if variant is not None:
        wanted = " nor ".join(_names_of_variant(variant))
        return f"{name!r} has no safetensors weights of variant={variant!r}, neither {wanted}. {_others(directory)}"
    pickles = [pickle for pickle in PICKLE_NAMES if (directory / pickle).is_file()]
    if not pickles:
        return f"{name!r} has no safetensors weights, neither {SINGLE_FILE} nor {INDEX_FILE}. {_others(directory)}"
    return (
        f"{name!r} has no safetensors weights, only {pickles[0]}. This converts pickled weights: "
        f"{_conversion_command(directory, name)}"
    )


def _others(directory: Path) -> str:
    """What weights there are instead, and what to do about them."""
    patterns = (*WEIGHT_PATTERNS, "model.*.safetensors", "model.safetensors.index.*.json", "*.safetensors")
    found = [path.name for pattern in patterns for path in sorted(directory.glob(pattern))]
    variants = [name for name in found if name.startswith("model.") and name not in (SINGLE_FILE, INDEX_FILE)]
    if variants:
        variant = variants[0].removeprefix("model.safetensors.index").removeprefix("model").split(".")[1]
        # One shard of several, whose index is not there.
        variant = re.sub(r"-\d+-of-\d+$", "", variant)
        return f"There is {variants[0]}: give variant={variant!r}"
    if found:
        return f"There is {found[0]}, by no name that transformers reads"
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    if ggufs:
        return (
            f"There is {ggufs[0]}: load it with LlamaForCausalLM.from_pretrained(directory, gguf_file={ggufs[0]!r}), "
            "and give that to dynconv_hf.retrofit(model)"
        )
    return "There are no weights of any kind: was the model downloaded as a whole?"


def _conversion_command(directory: Path, name: str) -> str:
    target = f"{os.path.basename(os.path.normpath(name))}-safetensors"
    classes = ["AutoModelForCausalLM"]
    # Not every model has a tokenizer beside it, but from the Hub only what retrofit_checkpoint wants is here.
    if any((directory / file).is_file() for file in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        classes.append("AutoTokenizer")
    saves = (f"{each}.from_pretrained({json.dumps(name)}).save_pretrained({json.dumps(target)})" for each in classes)
    return shlex.join(["python", "-c", "; ".join([f"from transformers import {', '.join(classes)}", *saves])])
