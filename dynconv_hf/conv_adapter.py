"""Convolution adapters: the convolutions alone, as a small file to put onto the Llama that they were trained with."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils import cached_file

from .adapter_base import CONV_FIELDS, HUB_ARGUMENTS, base_with_convs, conv_fields_of, listed
from .adapter_kind import CONV_ADAPTER_CONFIG_NAME, check_adapter_kind
from .distributed import is_divided
from .modeling import DynamicShortConv, DynConvLlamaForCausalLM
from .training import freeze_base, is_adapted

__all__ = ["load_conv_adapter", "push_conv_adapter", "save_conv_adapter"]

WEIGHTS_NAME = "conv_adapter.safetensors"
CONFIG_NAME = CONV_ADAPTER_CONFIG_NAME
CARD_NAME = "README.md"


def save_conv_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Saves the convolutions of a model whose base is frozen, see [`~dynconv_hf.freeze_base`].

    Args:
        model: a `DynConvLlamaForCausalLM`, also one that is wrapped for training.
        directory: a new or empty one.
        base_model_name_or_path: of the Llama below; None: where the model was loaded from.
        overwrite: replace the convolution adapter that the directory holds.

    Returns:
        The weights file.

    Raises:
        ValueError: the model is not a DynConv causal language model, its base is not frozen, or it has adapters or
            weights that are divided over processes or offloaded; or the directory holds something else.
        FileExistsError: the directory holds a convolution adapter, and `overwrite` is False.
    """
    model = _unwrap(model)
    directory = Path(directory).resolve()
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in _conv_parameters(model).items()}
    _check_base_is_frozen(model)
    _check_destination(directory, overwrite)
    base = base_model_name_or_path or model.config.name_or_path or None
    recorded = base_model_name_or_path is None
    record = {
        "base_model_name_or_path": base,
        "revision": getattr(model.config, "_commit_hash", None) if recorded else None,
        **conv_fields_of(model.config),
    }
    staging = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    staging.mkdir(parents=True)
    try:
        save_file(weights, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        (staging / CONFIG_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (staging / CARD_NAME).write_text(_card(base), encoding="utf-8")
        _move_into_place(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory / WEIGHTS_NAME


def load_conv_adapter(
    name_or_path: str | os.PathLike,
    base: LlamaForCausalLM | str | os.PathLike | None = None,
    *,
    adapter_revision: str | None = None,
    **kwargs: Any,
) -> DynConvLlamaForCausalLM:
    """Loads a Llama with the convolutions that [`save_conv_adapter`] saved; its base is frozen.

    Args:
        name_or_path: directory or Hub name of the adapter.
        base: name or path of the base, or a `LlamaForCausalLM`, which is left as it is and shares its weights. None:
            the base and revision that the adapter names.
        adapter_revision: of the adapter on the Hub.
        **kwargs: arguments of `from_pretrained` for the base (`dtype`, `device_map`, `quantization_config`, ...).
            Whatever its `dtype`, the convolutions have the dtype they were saved in.

    Raises:
        OSError: there is no convolution adapter of this name.
        ValueError: the adapter does not fit the base, or its files are damaged; or it is one of PEFT, which
            [`load_lora`] loads.
    """
    name = os.fspath(name_or_path)
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs} | {"revision": adapter_revision}
    check_adapter_kind(name_or_path, CONFIG_NAME, **hub)
    record = _read_record(cached_file(name, CONFIG_NAME, **hub))
    weights = _read_weights(cached_file(name, WEIGHTS_NAME, **hub))
    if base is None:
        base = record["base_model_name_or_path"]
        kwargs = {"revision": record["revision"], **kwargs}
    if isinstance(base, DynConvLlamaForCausalLM):
        raise ValueError(
            "this DynConvLlamaForCausalLM has convolutions already, which the adapter would overwrite: "
            "give the Llama, or the name of a checkpoint"
        )
    fields = {field: record[field] for field in CONV_FIELDS}
    model = base_with_convs(base, fields, kwargs, adapter=name)
    _put(weights, _conv_parameters(model), name)
    return freeze_base(model)


def push_conv_adapter(
    directory: str | os.PathLike, repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> str:
    """Uploads a saved convolution adapter, and nothing else that the directory holds, to the Hub; returns its URL."""
    directory = Path(directory)
    _read_record(directory / CONFIG_NAME)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        allow_patterns=[WEIGHTS_NAME, CONFIG_NAME, CARD_NAME],
        commit_message="Upload convolution adapter",
    )
    return commit.commit_url


def _unwrap(model: nn.Module) -> DynConvLlamaForCausalLM:
    found = [module for module in model.modules() if isinstance(module, DynConvLlamaForCausalLM)]
    if not found:
        raise ValueError(f"a convolution adapter is made of a DynConvLlamaForCausalLM, got {type(model).__name__}")
    if is_adapted(model):
        raise ValueError(
            "this model has PEFT adapters, without which its convolutions are not the same: save it with its own "
            "save_pretrained(), or merge_and_unload() it first"
        )
    return found[0]


def _conv_parameters(model: DynConvLlamaForCausalLM) -> dict[str, nn.Parameter]:
    if is_divided(model):
        raise ValueError("the weights of this model are divided over several processes: gather them first")
    parameters = {
        f"{module_name}.{name}": parameter
        for module_name, module in model.named_modules()
        if isinstance(module, DynamicShortConv)
        for name, parameter in module.named_parameters()
    }
    offloaded = [name for name, parameter in parameters.items() if parameter.is_meta]
    if offloaded:
        raise ValueError(f"{offloaded[0]} is offloaded: choose a device_map that keeps convolutions in memory")
    return parameters


def _check_base_is_frozen(model: DynConvLlamaForCausalLM) -> None:
    convs = {id(parameter) for parameter in _conv_parameters(model).values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in convs:
            raise ValueError(
                f"{name} is not frozen, and a convolution adapter does not hold it: save the model with "
                "save_pretrained(), or call freeze_base(model) if its base was never trained"
            )


def _check_destination(directory: Path, overwrite: bool) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{str(directory)!r} is not a directory")
    names = {entry.name for entry in directory.iterdir()}
    if names and CONFIG_NAME not in names:
        raise ValueError(f"{str(directory)!r} holds files that are no convolution adapter: choose another directory")
    if names and not overwrite:
        raise FileExistsError(f"{str(directory)!r} holds a convolution adapter: choose another, or overwrite=True")


def _move_into_place(staging: Path, directory: Path) -> None:
    if not directory.exists() or not any(directory.iterdir()):
        if directory.exists():
            directory.rmdir()
        staging.rename(directory)
        return
    # The card may have been written by hand since.
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        os.replace(staging / name, directory / name)


def _read_record(path: str | os.PathLike) -> dict[str, Any]:
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    expected = {"base_model_name_or_path", "revision", *CONV_FIELDS}
    if not isinstance(record, dict) or record.keys() != expected:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{str(path)!r} is not the config of a convolution adapter: expected {sorted(expected)}, got {found}"
        )
    return record


def _read_weights(path: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path!r} is damaged: {error}") from error


def _put(weights: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter], adapter: str) -> None:
    left, missing = weights.keys() - parameters.keys(), parameters.keys() - weights.keys()
    if left or missing:
        raise ValueError(
            f"the adapter {adapter!r} does not fit this base: {listed('has no place for', left)}"
            f"{'; ' if left and missing else ''}{listed('lacks', missing)}"
        )
    for name, tensor in weights.items():
        shape = tuple(parameters[name].shape)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"the adapter {adapter!r} does not fit this base: {name} has shape {tuple(tensor.shape)}, "
                f"but must have {shape}"
            )
    for name, tensor in weights.items():
        parameters[name].data = tensor.to(parameters[name].device)


def _card(base: str | None) -> str:
    # The Hub knows no local paths.
    on_hub = base is not None and not Path(base).exists()
    header = f"base_model: {base}\nbase_model_relation: adapter\n" if on_hub else ""
    return (
        f"---\n{header}tags:\n- dynconv\n---\n\n"
        "# Dynamic short convolutions\n\n"
        f"The convolutions alone, for `{base or 'a Llama'}`:\n\n"
        '```python\nimport dynconv_hf\n\nmodel = dynconv_hf.load_conv_adapter("this repository or directory")\n```\n'
    )
