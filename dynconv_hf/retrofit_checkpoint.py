"""A Llama checkpoint on disk becomes a DynConv checkpoint, and its weights are never loaded."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig
from transformers.utils import logging

from .adapter_kind import check_is_no_adapter
from .atomic_directory import check_destination, new_directory
from .checkpoint_files import (
    COMPANION_PATTERNS,
    INDEX_FILE,
    WEIGHT_PATTERNS,
    TensorHeader,
    companion_files,
    local_directory,
    open_shard,
    read_headers,
    weight_files,
)
from .model_card import write_model_card
from .modeling import DynConvLlamaForCausalLM
from .retrofit import check_supported, extend_config, materialize_convs, take_conv_fields

__all__ = ["retrofit_checkpoint"]

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# The file systems, and the rules of some kernels, under which a file cannot have a second name.
NO_LINK_ERRORS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
COPY_BYTES = 16 * 2**20
# What a checkpoint directory may hold besides weights and companions, and still be replaced as a whole.
OTHER_CHECKPOINT_PATTERNS = ("config.json", "README.md", ".gitattributes", "*.py")

logger = logging.get_logger(__name__)


def retrofit_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    overwrite: bool = False,
    copy: bool = False,
    variant: str | None = None,
    **kwargs: Any,
) -> Path:
    """Gives a Llama checkpoint dynamic short convolutions without loading it: seconds, whatever its size.

    The tensors are those of `retrofit(source).save_pretrained(destination)`, under the same `torch.manual_seed`. The
    safetensors files of the base get a second name in the destination (a hard link) where the file system can, and
    are copied where it cannot; one more file holds the convolutions. Saving a model over either name leaves the other
    as it was, because safetensors writes a new file and renames it; a program that writes into an existing file, like
    `cp`, would change both. Tokenizer, chat template, generation config and licence come along.

    Args:
        source: the Hub name or local path of a Llama causal language model, with safetensors weights.
        destination: the directory to make. It appears whole or not at all, however the run ends; the files of a
            killed run, beside it and named `.<destination>.dynconv-incomplete`, are cleared by the next.
        overwrite: replace an existing destination, if it is a checkpoint and holds nothing else.
        copy: copy the files of the base even where they could be linked.
        variant: of the weights, as in `from_pretrained`: "fp16" reads model.fp16.safetensors. The destination's files
            have the usual names.
        **kwargs: fields of [`DynConvLlamaConfig`] that begin with `conv_` (`conv_init` is "identity" if not given),
            and `cache_dir`, `force_download`, `local_files_only`, `revision`, `token` for a model on the Hub.

    Returns:
        The destination.

    Raises:
        TypeError: an unknown argument.
        ValueError: the source is not a Llama causal language model, is an adapter, quantised or damaged, or a field
            does not fit.
        FileNotFoundError: the source has no safetensors weights; the message holds the command that converts others.
        FileExistsError: the destination exists, and `overwrite` is not given or may not replace it.
        OSError: the source cannot be read or downloaded, or the disk is full.
    """
    conv_fields = take_conv_fields(kwargs, "retrofit_checkpoint()")
    unknown = sorted(set(kwargs) - set(HUB_ARGUMENTS))
    if unknown:
        raise TypeError(f"retrofit_checkpoint() knows no argument {unknown[0]!r}; for the Hub: {list(HUB_ARGUMENTS)}")
    destination = Path(os.path.abspath(destination))
    # Before anything is downloaded, though it is checked again when the destination is written.
    check_destination(destination, overwrite=overwrite, check_replaceable=_check_is_checkpoint)
    name = str(source)
    check_is_no_adapter(source, **kwargs)
    base_config = AutoConfig.from_pretrained(source, **kwargs)
    check_supported(base_config, repr(name))
    _check_not_quantized(base_config, name)
    config = extend_config(base_config, conv_fields)

    directory = local_directory(source, variant, **kwargs)
    _check_apart(directory, destination)
    files = weight_files(directory, name, variant)
    headers = read_headers(files)
    if config.dtype is None:
        config.dtype = _first_floating_dtype(files)
    with torch.device("meta"):
        model = DynConvLlamaForCausalLM(config)
    _check_tensors(model, headers, name)
    with new_directory(destination, overwrite=overwrite, check_replaceable=_check_is_checkpoint) as staging:
        _write(staging, model, destination.name, directory, files, headers, copy)
    return destination


def _write(
    staging: Path,
    model: DynConvLlamaForCausalLM,
    name: str,
    directory: Path,
    files: list[Path],
    headers: dict[str, TensorHeader],
    copy: bool,
) -> None:
    shards = [f"model-{number:05}-of-{len(files) + 1:05}.safetensors" for number in range(1, len(files) + 2)]
    convs = _make_convs(model)
    _save_convs(convs, staging / shards[-1], mode_of=files[0])
    new_names = {file.name: shard for file, shard in zip(files, shards, strict=False)}
    _write_index(staging / INDEX_FILE, model, convs, headers, {**new_names, "convs": shards[-1]})
    model.config.save_pretrained(staging)
    write_model_card(model, staging, name)
    for companion in companion_files(directory):
        (staging / companion).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / companion, staging / companion)
    _link_or_copy([(file, staging / new_names[file.name]) for file in files], copy)


def _make_convs(model: DynConvLlamaForCausalLM) -> dict[str, torch.Tensor]:
    for layer in model.model.layers:
        materialize_convs(layer, device=torch.device("cpu"), dtype=model.config.dtype)
    return {name: tensor for name, tensor in model.state_dict().items() if "_conv." in name}


def _save_convs(convs: dict[str, torch.Tensor], path: Path, mode_of: Path) -> None:
    try:
        save_file(convs, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if "os error 28" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    # safetensors makes files that only their owner may read, even in a directory shared with others.
    shutil.copymode(mode_of, path)


def _write_index(
    path: Path,
    model: DynConvLlamaForCausalLM,
    convs: dict[str, torch.Tensor],
    headers: dict[str, TensorHeader],
    new_names: dict[str, str],
) -> None:
    expected = model.state_dict()
    kept = {name: header for name, header in headers.items() if name in expected}
    weight_map = {name: new_names[header.file] for name, header in kept.items()}
    weight_map |= dict.fromkeys(convs, new_names["convs"])
    total_size = sum(header.bytes for header in kept.values()) + sum(tensor.nbytes for tensor in convs.values())
    metadata = {"total_parameters": model.num_parameters(), "total_size": total_size}
    index = {"metadata": metadata, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _link_or_copy(pairs: list[tuple[Path, Path]], copy: bool) -> None:
    to_copy = [(source, target) for source, target in pairs if copy or not _link(source, target)]
    if not to_copy:
        return
    total = sum(source.stat().st_size for source, _ in to_copy)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Copying weights") as progress:
        for source, target in to_copy:
            with open(source, "rb") as reader, open(target, "wb") as writer:
                while block := reader.read(COPY_BYTES):
                    writer.write(block)
                    progress.update(len(block))


def _link(source: Path, target: Path) -> bool:
    try:
        # The Hub's cache holds symbolic links; the file itself is what gets another name.
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in NO_LINK_ERRORS:
            raise
        return False
    return True


def _first_floating_dtype(files: list[Path]) -> torch.dtype:
    """As transformers does where the config names none."""
    for file in files:
        shard = open_shard(file)
        for name in shard.keys():  # noqa: SIM118
            dtype = shard.get_slice(name)[:0].dtype
            if dtype.is_floating_point:
                return dtype
    raise ValueError(f"{files[0]} holds no floating-point tensor")


def _check_tensors(model: DynConvLlamaForCausalLM, headers: dict[str, TensorHeader], name: str) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if "_conv." not in key}
    optional = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(set(expected) - set(headers) - optional)
    if missing:
        raise ValueError(f"{name!r} has no weights for {len(missing)} tensors of its config, {missing[0]} the first")
    for key in sorted(set(expected) & set(headers)):
        if headers[key].shape != expected[key]:
            raise ValueError(f"{name!r} has {key} of shape {headers[key].shape}, but its config says {expected[key]}")
    # Old checkpoints have rotary_emb.inv_freq, which is computed nowadays.
    unknown = sorted(key for key in set(headers) - set(expected) if not key.endswith("rotary_emb.inv_freq"))
    if unknown:
        logger.warning(f"{name!r} has {len(unknown)} tensors that no Llama has, {unknown[0]} the first: left out")


def _check_not_quantized(config: LlamaConfig, name: str) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    raise ValueError(
        f"{name!r} is quantised ({getattr(method, 'value', method)}): give the checkpoint it was made from, or load "
        f"this one with dynconv_hf.retrofit({name!r})"
    )


def _check_apart(source: Path, destination: Path) -> None:
    source, destination = source.resolve(), destination.resolve()
    if source == destination or source in destination.parents or destination in source.parents:
        raise ValueError(f"source and destination must lie apart, got {str(source)!r} and {str(destination)!r}")


def _check_is_checkpoint(directory: Path) -> None:
    """Refuses to replace a directory unless all it holds are the files of a checkpoint."""
    patterns = (*WEIGHT_PATTERNS, *COMPANION_PATTERNS, *OTHER_CHECKPOINT_PATTERNS)
    files = {path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()}
    others = sorted(files - {path for pattern in patterns for path in directory.glob(pattern)})
    if others:
        raise FileExistsError(
            errno.EEXIST, "overwrite=True replaces checkpoints and nothing else, but this is there", str(others[0])
        )
    if files and not _is_model_config(directory / "config.json"):
        raise FileExistsError(
            errno.EEXIST, "overwrite=True replaces checkpoints, and this has no config.json of a model", str(directory)
        )


def _is_model_config(path: Path) -> bool:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config
