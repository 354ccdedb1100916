"""LoRA on the linear layers, with the convolutions trained in full beside it: the PEFT config, and the way back."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME

from .adapter_base import HUB_ARGUMENTS, base_with_convs, conv_fields_of, listed
from .adapter_kind import check_adapter_kind
from .modeling import DynamicShortConv, DynConvLlamaConfig
from .modeling.configuration_dynconv_llama import conv_name

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = ["load_lora", "lora_config"]

# PEFT picks the wrapper of a model, and what it keeps of a new head, by the task.
TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def lora_config(model: nn.Module, **lora_kwargs: Any) -> "LoraConfig":
    """The `LoraConfig` that adapts the linear layers of a DynConv model and trains its convolutions in full.

    Every convolution is named in `modules_to_save` as a whole module, with its bare parameters: all that is trained
    is saved, and all that is saved is loaded. The config also records the convolutions, for [`load_lora`].

    Args:
        model: a DynConv model, also one that has adapters already.
        **lora_kwargs: arguments of `peft.LoraConfig` (`r`, `lora_alpha`, `lora_dropout`, ...). Without
            `target_modules` every linear layer but the head is adapted; `modules_to_save` adds to the convolutions.

    Raises:
        TypeError: `auto_mapping` is given, which holds the record of the convolutions.
        ValueError: the model has no convolutions, or an argument adapts a convolution that is trained in full.

    Example:

    ```python
    >>> model = dynconv_hf.retrofit("meta-llama/Llama-3.2-1B")
    >>> model = peft.get_peft_model(model, dynconv_hf.lora_config(model, r=16, lora_alpha=32))
    ```
    """
    from peft import LoraConfig

    config = getattr(model, "config", None)
    if not isinstance(config, DynConvLlamaConfig):
        raise ValueError(f"lora_config() takes a DynConv model, got {type(model).__name__}: retrofit() it first")
    if "auto_mapping" in lora_kwargs:
        raise TypeError("lora_config() records the convolutions in auto_mapping itself: leave it out")
    convs = sorted(conv_name(target) for target in config.conv_targets)
    for argument in ("target_modules", "target_parameters"):
        _check_adapts_no_conv(argument, lora_kwargs.get(argument), convs)
    lora_kwargs.setdefault("target_modules", "all-linear")
    lora_kwargs.setdefault("task_type", _task_type(model))
    lora_kwargs.setdefault("revision", getattr(config, "_commit_hash", None))
    lora_kwargs["modules_to_save"] = [*convs, *(lora_kwargs.get("modules_to_save") or [])]
    lora_kwargs["auto_mapping"] = {
        "base_model_class": "DynConvLlamaForCausalLM",
        "parent_library": "dynconv_hf",
        **conv_fields_of(config),
    }
    return LoraConfig(**lora_kwargs)


def load_lora(
    name_or_path: str | os.PathLike,
    base: PreTrainedModel | str | os.PathLike | None = None,
    *,
    adapter_revision: str | None = None,
    is_trainable: bool = False,
    **kwargs: Any,
) -> "PeftModel":
    """Loads an adapter made with [`lora_config`], convolutions included, onto the Llama it was trained from.

    PEFT alone loads what it finds a place for, and is silent about the rest: on a Llama that was not retrofitted in
    the very same way, the convolutions would be missing. Here, that is an error.

    Args:
        name_or_path: directory or Hub name of the adapter.
        base: name or path of the base, or a model object: a Llama, or a DynConv model with the same convolutions.
            None: the base and revision that the adapter names.
        adapter_revision: of the adapter on the Hub.
        is_trainable: to train the adapter further.
        **kwargs: arguments of `from_pretrained` for the base (`device_map`, `quantization_config`, ...). Whatever
            its `dtype`, the convolutions have the dtype they were saved in.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the adapter does not fit the base, or does not say which convolutions the base needs; or it holds
            the convolutions alone, which [`load_conv_adapter`] loads.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    path = os.fspath(name_or_path)
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs} | {"revision": adapter_revision}
    check_adapter_kind(name_or_path, ADAPTER_CONFIG_NAME, **hub)
    config = PeftConfig.from_pretrained(path, **hub)
    record = config.auto_mapping or {}
    fields = {key: value for key, value in record.items() if key.startswith("conv_")}
    if base is None:
        base = config.base_model_name_or_path
        kwargs = {"revision": config.revision, **kwargs}
    if config.task_type != "CAUSAL_LM" and not isinstance(base, nn.Module):
        raise ValueError(f"the adapter {path!r} is for the task {config.task_type}: give the model as `base`")
    model = base_with_convs(base, fields, kwargs, adapter=path)
    weights = load_peft_weights(path, device="cpu", **hub)
    _take_conv_dtype(model, weights)
    config.inference_mode = not is_trainable
    adapted = PeftModel.from_pretrained(model, path, is_trainable=is_trainable, config=config, **hub)
    _check_all_loaded(adapted, weights, path)
    return adapted


def _check_adapts_no_conv(argument: str, names: str | Iterable[str] | None, convs: list[str]) -> None:
    names = [names] if isinstance(names, str) else list(names or [])
    adapted = [name for name in names if any(conv in name for conv in convs)]
    if adapted:
        raise ValueError(f"{argument} names {adapted[0]!r}, but convolutions are trained in full: leave it out")


def _task_type(model: nn.Module) -> str:
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for ending, task_type in TASK_TYPES.items():
        if type(model).__name__.endswith(ending):
            return task_type
    return "FEATURE_EXTRACTION"


def _take_conv_dtype(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """PEFT copies each tensor into the dtype that it finds: what was trained in float32 would be rounded."""
    dtypes = {tensor.dtype for name, tensor in weights.items() if "_conv." in name}
    if len(dtypes) != 1:
        return
    for module in model.modules():
        if isinstance(module, DynamicShortConv):
            module.to(*dtypes)


def _check_all_loaded(model: "PeftModel", weights: dict[str, torch.Tensor], path: str) -> None:
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    # PEFT may save embeddings besides, which belong to no adapter.
    left = [name for name in weights.keys() - expected if "_conv." in name or ".lora_" in name]
    missing = expected - weights.keys()
    if left or missing:
        raise ValueError(
            f"the adapter {path!r} does not fit this base: {listed('has no place for', left)}"
            f"{'; ' if left and missing else ''}{listed('lacks', missing)}"
        )
