"""An existing Llama checkpoint becomes a DynConv model that starts equal to it."""

import copy
import os
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from .adapter_kind import check_is_no_adapter
from .distributed import draw_convs_alike, is_divided
from .modeling import DynamicShortConv, DynConvLlamaConfig, DynConvLlamaForCausalLM
from .plain_llama import check_attention, check_forwards, check_layers, check_weights

__all__ = ["retrofit"]

CONV_FIELDS = tuple(field.name for field in fields(DynConvLlamaConfig) if field.name.startswith("conv_"))
SUPPORTED = 'Llama causal language models (model_type "llama", LlamaForCausalLM)'
# What both the config and the weights are loaded with; AutoConfig keeps these to itself.
SHARED_ARGUMENTS = (
    "attn_implementation",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# What says how to make the model, though configs have fields of these names: AutoConfig would take them for itself.
MODEL_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config")
# Where transformers, PEFT and accelerate look to see that a model is quantised.
QUANTIZATION_ATTRIBUTES = (
    "hf_quantizer",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_quantized",
    "quantization_method",
)


def retrofit(model_or_name_or_path: PreTrainedModel | str | os.PathLike, **kwargs: Any) -> DynConvLlamaForCausalLM:
    """Gives a Llama causal language model dynamic short convolutions; by default it starts equal to the original.

    Args:
        model_or_name_or_path: a `LlamaForCausalLM`, or the Hub name or local path of one. A model object is left as
            it is, and shares its weights with the result: train one, and the other moves with it.
        **kwargs: fields of [`DynConvLlamaConfig`] that begin with `conv_` (`conv_init` is "identity" if not given);
            with a name or path, also every argument of `from_pretrained` (`dtype`, `device_map`,
            `quantization_config`, `attn_implementation`, `revision`, `token`, ...) but `config` and `gguf_file`.

    Returns:
        The model, in evaluation mode from a name or path, in the mode of the original from a model object. With
        `output_loading_info=True`, the model and what transformers says of the loading.

    Raises:
        FileNotFoundError: a path leads to no folder.
        TypeError: an unknown `conv_` field, or the argument is neither a model nor a name or path.
        ValueError: the model is not a Llama causal language model, already has convolutions, has something that the
            result could not keep (adapters, parametrisations, layers that its config does not know, a `forward` of
            its own), or a field does not fit.
    """
    conv_fields = take_conv_fields(kwargs, "retrofit()")
    if isinstance(model_or_name_or_path, str | os.PathLike):
        return _retrofit_checkpoint(model_or_name_or_path, conv_fields, kwargs)
    if not isinstance(model_or_name_or_path, nn.Module):
        raise TypeError(
            "retrofit() takes a LlamaForCausalLM, or the name or path of one, "
            f"got {type(model_or_name_or_path).__name__}"
        )
    if kwargs:
        raise TypeError(
            f"retrofit() takes from_pretrained arguments only with a name or path, got {sorted(kwargs)} with a model"
        )
    return _retrofit_model(model_or_name_or_path, conv_fields)


def take_conv_fields(kwargs: dict[str, Any], caller: str) -> dict[str, Any]:
    """Moves the fields that begin with `conv_` out of kwargs, and adds the start that retrofits have by default."""
    conv_fields = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("conv_")}
    unknown = sorted(set(conv_fields) - set(CONV_FIELDS))
    if unknown:
        raise TypeError(f"{caller} knows no argument {unknown[0]!r}; the convolution is set by {list(CONV_FIELDS)}")
    without_prefix = [key for key in kwargs if f"conv_{key}" in CONV_FIELDS]
    if without_prefix:
        key = without_prefix[0]
        raise TypeError(f"{caller} knows no argument {key!r}; say conv_{key}={kwargs[key]!r}")
    return {"conv_init": "identity", **conv_fields}


class _NewConvolutions(DynConvLlamaForCausalLM):
    """Loads a checkpoint whose convolutions are to be made, not read: transformers need not report them missing."""

    _keys_to_ignore_on_load_missing = [r"_conv\."]  # noqa: RUF012


# transformers picks the loss of a model by the name of its class.
_NewConvolutions.__name__ = DynConvLlamaForCausalLM.__name__


def _retrofit_checkpoint(
    name_or_path: str | os.PathLike, conv_fields: dict[str, Any], kwargs: dict[str, Any]
) -> DynConvLlamaForCausalLM:
    if "config" in kwargs:
        raise TypeError("retrofit() reads the config of the checkpoint: give the fields to change instead of config")
    if kwargs.get("gguf_file") is not None:
        raise TypeError(
            f"retrofit() takes no gguf_file, got {kwargs['gguf_file']!r}: load the Llama first, "
            f"retrofit(LlamaForCausalLM.from_pretrained({str(name_or_path)!r}, gguf_file={kwargs['gguf_file']!r}))"
        )
    shared = {key: kwargs[key] for key in SHARED_ARGUMENTS if key in kwargs}
    check_is_no_adapter(name_or_path, **_reading(shared))
    for_model = {key: kwargs.pop(key) for key in MODEL_ARGUMENTS if key in kwargs}
    wants_loading_info = kwargs.pop("output_loading_info", False)
    config, kwargs = AutoConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs)
    check_supported(config, repr(str(name_or_path)))
    config._commit_hash = _commit(name_or_path, shared)
    model, info = _NewConvolutions.from_pretrained(
        name_or_path,
        config=extend_config(config, conv_fields),
        output_loading_info=True,
        **{**kwargs, **shared, **for_model},
    )
    model.__class__ = DynConvLlamaForCausalLM
    _check_convs_are_not_on_disk(model)
    if is_divided(model):
        draw_convs_alike(model)
    return (model, info) if wants_loading_info else model


def _reading(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments for config and weights, those that say how one file is read."""
    unused = ("attn_implementation", "force_download")
    return {key: value for key, value in arguments.items() if key not in unused}


def _commit(name_or_path: str | os.PathLike, arguments: dict[str, Any]) -> str | None:
    """The commit that was read, of a name on the Hub: later releases of transformers do not note it in the config."""
    if os.path.isdir(name_or_path):
        return None
    return extract_commit_hash(cached_file(name_or_path, CONFIG_NAME, **_reading(arguments)), None)


def _retrofit_model(base: nn.Module, conv_fields: dict[str, Any]) -> DynConvLlamaForCausalLM:
    check_supported(getattr(base, "config", None), f"this {type(base).__name__}")
    if not isinstance(base, LlamaForCausalLM):
        raise ValueError(f"retrofit() supports {SUPPORTED}, got {type(base).__name__}: give it the LlamaForCausalLM")
    _check_in_one_place(base)
    check_forwards(base)
    check_layers(base)
    config = extend_config(base.config, conv_fields)
    config._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        model = DynConvLlamaForCausalLM(config)
    check_weights(base, model)
    check_attention(base, model)
    _share_weights(base, model)
    for new_layer, layer in zip(model.model.layers, base.model.layers, strict=True):
        materialize_convs(new_layer, device=layer.input_layernorm.weight.device, dtype=base.dtype)
    for name in QUANTIZATION_ATTRIBUTES:
        if hasattr(base, name):
            setattr(model, name, getattr(base, name))
    model.generation_config = copy.deepcopy(base.generation_config)
    return model.train(base.training)


def _check_convs_are_not_on_disk(model: DynConvLlamaForCausalLM) -> None:
    # accelerate reads what is offloaded to disk from the files of the checkpoint, which has no convolutions.
    device_map = getattr(model, "hf_device_map", None) or {}
    on_disk = tuple(f"{name}." if name else "" for name, device in device_map.items() if device == "disk")
    if any("_conv." in name and name.startswith(on_disk) for name, _ in model.named_parameters()):
        raise ValueError(
            "device_map offloads new convolutions to disk, but the checkpoint has no weights for them. Save the "
            "retrofitted model, retrofit(name_or_path).save_pretrained(directory), and load that with this device_map"
        )


def _check_in_one_place(base: LlamaForCausalLM) -> None:
    device_map = getattr(base, "hf_device_map", None) or {}
    if len(set(device_map.values())) > 1:
        raise ValueError(
            f"this model is spread over the devices {sorted(map(str, set(device_map.values())))}: "
            "call retrofit(name_or_path, device_map=...) instead, which places the convolutions with their layers"
        )
    if any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(
            "this model has weights on the meta device, because they are offloaded or not loaded yet: "
            "call retrofit(name_or_path, device_map=...) instead"
        )
    if is_divided(base):
        raise ValueError(
            "the weights of this model are divided over several processes: call "
            "retrofit(name_or_path, distributed_config=...) instead, which divides the convolutions with their layers"
        )


def check_supported(config: PreTrainedConfig | None, what: str) -> None:
    """Refuses what is not a plain Llama; `what` names it in the message."""
    model_type = getattr(config, "model_type", None)
    if model_type == DynConvLlamaConfig.model_type:
        raise ValueError(
            f"{what} already has dynamic short convolutions: load it with AutoModelForCausalLM.from_pretrained"
        )
    if model_type != LlamaConfig.model_type:
        raise ValueError(f"retrofit() supports {SUPPORTED}, but {what} has model_type {model_type!r}")


def extend_config(base: LlamaConfig, conv_fields: dict[str, Any]) -> DynConvLlamaConfig:
    """The config of a Llama, with convolutions."""
    values = base.to_dict()
    for key in ("model_type", "architectures", "auto_map"):
        values.pop(key, None)
    config = DynConvLlamaConfig.from_dict({**values, **conv_fields})
    config.architectures = [DynConvLlamaForCausalLM.__name__]
    config.name_or_path = base.name_or_path
    # Adapters note the very commit of their base.
    config._commit_hash = getattr(base, "_commit_hash", None)
    return config


def _share_weights(base: LlamaForCausalLM, model: DynConvLlamaForCausalLM) -> None:
    """Modules rather than tensors: a quantised linear layer is more than its weight."""
    model.lm_head = base.lm_head
    for name in ("embed_tokens", "norm"):
        setattr(model.model, name, getattr(base.model, name))
    # Its frequencies are no weights, and with some kinds of RoPE they change with the length of what a model has read.
    model.model.rotary_emb = copy.deepcopy(base.model.rotary_emb)
    model.model.rotary_emb.config = model.config
    for new_layer, layer in zip(model.model.layers, base.model.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(new_layer, name, getattr(layer, name))
        for block in ("self_attn", "mlp"):
            for name, module in getattr(layer, block).named_children():
                setattr(getattr(new_layer, block), name, module)


def materialize_convs(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Starts the convolutions of a layer on the meta device; layer after layer, it draws as loading a model does."""
    for module in layer.modules():
        if isinstance(module, DynamicShortConv):
            module.to(dtype).to_empty(device=device)
            module.reset_parameters()
