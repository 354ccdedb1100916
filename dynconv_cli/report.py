"""What `dynconv inspect` knows of a checkpoint, read from its files tensor by tensor."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dynconv_hf import DynConvLlamaConfig
from dynconv_hf.adapter_kind import LOADERS, adapter_file, find_file
from dynconv_hf.checkpoint_files import TensorHeader, local_directory, open_shard, read_headers, weight_files
from dynconv_hf.modeling.configuration_dynconv_llama import conv_name

__all__ = ["make_report", "totals"]

CONV = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_conv)\.(.+)")
CONV_FIELDS = ("targets", "mode", "kernel_size", "rank", "head_size", "static", "residual", "layers", "init")
# In the order of the table; the first pattern that is found in a tensor's name decides.
PARTS = (
    ("convolutions", "_conv."),
    ("embeddings", "embed_tokens."),
    ("output head", "lm_head."),
    ("attention", ".self_attn."),
    ("feed-forward", ".mlp."),
    ("norms", "norm."),
)


def totals(directory: Path) -> dict[str, int]:
    """Parameters and bytes in the files, and the convolutions' share."""
    headers = read_headers(weight_files(directory, str(directory)))
    convs = {name: header for name, header in headers.items() if "_conv." in name}
    return {
        "parameters": sum(map(_size, headers.values())),
        "conv_parameters": sum(map(_size, convs.values())),
        "bytes": sum(header.bytes for header in headers.values()),
        "conv_bytes": sum(header.bytes for header in convs.values()),
    }


def make_report(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """Architecture, parameters, memory, and how far each convolution is from the identity.

    Raises:
        ValueError: the checkpoint has no convolutions, or is an adapter.
    """
    hub_arguments = {} if revision is None else {"revision": revision}
    _check_is_no_adapter(name_or_path, hub_arguments)
    config = AutoConfig.from_pretrained(name_or_path, **hub_arguments)
    if not isinstance(config, DynConvLlamaConfig):
        raise ValueError(
            f"{name_or_path!r} has no dynamic short convolutions (model_type {config.model_type!r}); "
            "`dynconv retrofit` gives a Llama some"
        )
    directory = local_directory(name_or_path, **hub_arguments)
    files = weight_files(directory, name_or_path)
    headers = read_headers(files)
    return {
        "checkpoint": name_or_path,
        "architecture": config.architectures[0] if config.architectures else None,
        "dtype": str(config.dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "convolutions": {field: getattr(config, f"conv_{field}") for field in CONV_FIELDS},
        "parts": _parts(headers),
        "cache": _cache(config),
        "distances": _distances(files, config),
    }


def _check_is_no_adapter(name_or_path: str, hub_arguments: dict[str, str]) -> None:
    # A checkpoint may have an adapter beside it, and is what is inspected then.
    if find_file(name_or_path, "config.json", **hub_arguments) is not None:
        return
    file = adapter_file(name_or_path, **hub_arguments)
    if file is not None:
        merge = ".merge_and_unload()" if LOADERS[file] == "load_lora" else ""
        raise ValueError(
            f"{name_or_path!r} is an adapter, and `dynconv inspect` reads whole checkpoints: make one with "
            f"dynconv_hf.{LOADERS[file]}({name_or_path!r}){merge}.save_pretrained(...)"
        )


def _parts(headers: dict[str, TensorHeader]) -> list[dict[str, Any]]:
    parts = {label: {"part": label, "parameters": 0, "bytes": 0} for label, _ in (*PARTS, ("other", ""))}
    for name, header in headers.items():
        label = next((label for label, pattern in PARTS if pattern in name), "other")
        parts[label]["parameters"] += _size(header)
        parts[label]["bytes"] += header.bytes
    return [part for part in parts.values() if part["bytes"]]


def _cache(config: DynConvLlamaConfig) -> dict[str, int]:
    """What generation keeps in memory: keys and values for each token, states of convolutions for each sequence."""
    itemsize = (config.dtype or torch.get_default_dtype()).itemsize
    key_values = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    channels = sum(config.linear_features(target)[1] for target in config.conv_targets)
    conv_layers = sum(config.has_conv(layer) for layer in range(config.num_hidden_layers))
    return {
        "key_value_bytes_per_token": key_values * itemsize,
        "conv_state_bytes_per_sequence": (config.conv_kernel_size - 1) * channels * conv_layers * itemsize,
    }


def _distances(files: list[Path], config: DynConvLlamaConfig) -> list[dict[str, Any]]:
    owners: dict[tuple[int, str], dict[str, Path]] = {}
    for file in files:
        for name in open_shard(file).keys():  # noqa: SIM118
            if match := CONV.fullmatch(name):
                layer, conv, _ = match.groups()
                owners.setdefault((int(layer), conv), {})[name] = file
    order = [conv_name(target) for target in config.conv_targets]
    return [
        {"layer": layer, "conv": conv, **_distance(owners[layer, conv], config)}
        for layer, conv in sorted(owners, key=lambda owner: (owner[0], order.index(owner[1])))
    ]


def _distance(tensors: dict[str, Path], config: DynConvLlamaConfig) -> dict[str, float]:
    """How far the filter of a convolution is from the one that changes nothing, in root mean squares.

    The mean is over channels and, for the dynamic part, over hidden states of independent entries with variance 1,
    about what a norm layer gives. "static" and "dynamic" are legs of a right triangle, "total" its hypotenuse.
    """
    parameters = {
        CONV.fullmatch(name).group(3): open_shard(file).get_tensor(name).float() for name, file in tensors.items()
    }
    static = _static_square(parameters.get("static_filter"), config.conv_residual)
    dynamic = _dynamic_square(parameters, config.conv_kernel_size)
    return {"static": math.sqrt(static), "dynamic": math.sqrt(dynamic), "total": math.sqrt(static + dynamic)}


def _static_square(static_WD: torch.Tensor | None, residual: bool) -> float:
    # Without the residual, a first tap of 1 is what changes nothing.
    identity = 0.0 if residual else 1.0
    if static_WD is None:
        return identity
    difference_WD = static_WD.clone()
    difference_WD[0] -= identity
    return difference_WD.square().sum(0).mean().item()


def _dynamic_square(parameters: dict[str, torch.Tensor], kernel_size: int) -> float:
    if "filter_proj.weight" not in parameters:
        return 0.0
    weight = parameters["filter_proj.weight"]
    if "basis" not in parameters:
        heads = weight.shape[0] // kernel_size
        return weight.square().sum().item() / heads
    basis_RX = parameters["basis"].flatten(1)
    channels = parameters["basis"].shape[-1]
    return ((weight @ weight.T @ basis_RX) * basis_RX).sum().item() / channels


def _size(header: TensorHeader) -> int:
    return math.prod(header.shape)
