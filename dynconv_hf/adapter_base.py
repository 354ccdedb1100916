"""What adapters are loaded onto: a Llama with the convolutions that it had in training."""

import os
from collections.abc import Collection
from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedModel

from .adapter_kind import check_is_no_adapter
from .modeling import DynConvLlamaConfig, DynConvLlamaForCausalLM
from .modeling.configuration_dynconv_llama import COMPUTATION_FIELDS
from .retrofit import CONV_FIELDS as RETROFIT_FIELDS
from .retrofit import retrofit

__all__ = ["CONV_FIELDS", "HUB_ARGUMENTS", "base_with_convs", "conv_fields_of", "listed"]

# What an adapter was trained with: which convolutions, not how they were computed.
CONV_FIELDS = tuple(name for name in RETROFIT_FIELDS if name not in COMPUTATION_FIELDS)
MODE_OF_FIELD = {"conv_rank": "lowrank", "conv_head_size": "headwise"}
# What reaches the Hub, for the adapter as for the base.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")


def conv_fields_of(config: DynConvLlamaConfig) -> dict[str, Any]:
    """The fields that give a Llama the convolutions of `config`, as retrofit() takes them."""
    return {name: getattr(config, name) for name in CONV_FIELDS}


def base_with_convs(
    base: PreTrainedModel | str | os.PathLike | None, conv_fields: dict[str, Any], kwargs: dict[str, Any], adapter: str
) -> PreTrainedModel:
    """The base of the adapter named `adapter`, with the convolutions that `conv_fields` describes.

    Raises:
        ValueError: there is no base, or it cannot have these convolutions.
    """
    if not base:
        raise ValueError(f"the adapter {adapter!r} does not name its base: give `base`")
    kwargs = {key: value for key, value in kwargs.items() if (key, value) != ("revision", None)}
    if not isinstance(base, str | os.PathLike):
        if kwargs:
            raise TypeError(f"from_pretrained arguments go with a name or path of the base, got {sorted(kwargs)}")
        config, what = getattr(base, "config", None), f"this {type(base).__name__}"
    else:
        reading = {key: kwargs[key] for key in (*HUB_ARGUMENTS, "revision", "subfolder") if key in kwargs}
        check_is_no_adapter(base, **reading)
        config, what = AutoConfig.from_pretrained(base, **reading), repr(os.fspath(base))
    if isinstance(config, DynConvLlamaConfig):
        _check_same_convs(config, conv_fields, what, adapter)
        return base if isinstance(base, PreTrainedModel) else DynConvLlamaForCausalLM.from_pretrained(base, **kwargs)
    if type(config) is LlamaConfig and not conv_fields:
        raise ValueError(
            f"the adapter {adapter!r} does not say which convolutions it was trained with: retrofit the base "
            "in the same way, and give the model as `base`"
        )
    return retrofit(base, **conv_fields, **kwargs)


def listed(what: str, names: Collection[str]) -> str:
    """As in "lacks 7 tensors, a.b the first of them"; nothing where there are none."""
    return f"{what} {len(names)} tensors, {min(names)} the first of them" if names else ""


def _check_same_convs(config: DynConvLlamaConfig, conv_fields: dict[str, Any], what: str, adapter: str) -> None:
    # How they once started makes no difference to what they are, nor does what the mode has no use for.
    unused = {"conv_init"}
    unused |= {name for name, mode in MODE_OF_FIELD.items() if conv_fields.get("conv_mode") != mode}
    for name, value in conv_fields.items():
        if name not in unused and getattr(config, name) != value:
            raise ValueError(
                f"the adapter {adapter!r} does not fit {what}: its {name} is {value!r}, but that of the base is "
                f"{getattr(config, name)!r}"
            )
