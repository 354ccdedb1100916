"""The files of a checkpoint, on disk or on the Hub: which there are, and what the weights' headers say."""

import json
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import parse_local_safetensors_file_metadata, snapshot_download
from safetensors import SafetensorError, safe_open

__all__ = ["TensorHeader", "companion_files", "local_directory", "open_shard", "read_headers", "weight_files"]

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


def local_directory(name_or_path: str | os.PathLike, **hub_arguments: Any) -> Path:
    """The directory itself, or the files of a model on the Hub: its weights and what belongs to them."""
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    # The card tells the licence.
    patterns = ["config.json", "README.md", *WEIGHT_PATTERNS, *COMPANION_PATTERNS]
    return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **hub_arguments))


def weight_files(directory: Path, name: str) -> list[Path]:
    """The safetensors files that hold the weights, in order.

    Raises:
        FileNotFoundError: there are none, or the index names one that is not there.
        ValueError: the index cannot be read.
    """
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if not (directory / INDEX_FILE).is_file():
        raise FileNotFoundError(_no_safetensors(directory, name))
    names = _files_of_index(directory / INDEX_FILE)
    missing = [file for file in names if not (directory / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory / INDEX_FILE} names {missing[0]}, which is not there")
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


def _no_safetensors(directory: Path, name: str) -> str:
    pickles = [pickle for pickle in PICKLE_NAMES if (directory / pickle).is_file()]
    found = f"only {pickles[0]}" if pickles else f"neither {SINGLE_FILE} nor {INDEX_FILE}"
    return (
        f"{name!r} has no safetensors weights, {found}. This converts pickled weights: "
        f"{_conversion_command(directory, name)}"
    )


def _conversion_command(directory: Path, name: str) -> str:
    target = f"{os.path.basename(os.path.normpath(name))}-safetensors"
    classes = ["AutoModelForCausalLM"]
    # Not every model has a tokenizer beside it, but from the Hub only what retrofit_checkpoint wants is here.
    if any((directory / file).is_file() for file in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        classes.append("AutoTokenizer")
    saves = (f"{each}.from_pretrained({json.dumps(name)}).save_pretrained({json.dumps(target)})" for each in classes)
    return shlex.join(["python", "-c", "; ".join([f"from transformers import {', '.join(classes)}", *saves])])
