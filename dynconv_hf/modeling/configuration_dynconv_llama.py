"""Configuration of Llama with dynamic short convolutions."""

import os
from typing import Any

from transformers import LlamaConfig

from ..hub import AUTO_MAP, code_files, write_code
from .liger import register_with_liger

__all__ = ["CONV_TARGETS", "DynConvLlamaConfig", "conv_name"]

CONV_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONV_MODES = ("lowrank", "headwise", "static")
CONV_INITS = ("uniform", "identity")
# How the model is computed, not which model it is.
COMPUTATION_FIELDS = ("conv_recompute", "conv_fused")
MAX_KERNEL_SIZE = 8

# Names in transformers' registry of parallel styles; what they do is in parallel_styles.py.
CHANNELS_STYLE = "dynconv_channels"
COEFFICIENTS_STYLE = "dynconv_coefficients"


class DynConvLlamaConfig(LlamaConfig):
    """Configuration of a Llama whose linear layers are followed by dynamic short convolutions.

    Takes every field of [`~transformers.LlamaConfig`], and:

    Args:
        conv_targets (`list[str]` or `"all-linear"`, defaults to `["q_proj", "k_proj", "v_proj"]`):
            The linear layers followed by a convolution: any of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`,
            `up_proj`, `down_proj`; `"all-linear"` names all seven.
        conv_mode (`str`, defaults to `"lowrank"`):
            How a token makes its filter: `"lowrank"`, `"headwise"`, or `"static"` (not at all: a Canon layer).
        conv_kernel_size (`int`, defaults to 4): W, the number of taps, from 1 to 8.
        conv_rank (`int`, defaults to 15): R, the number of basis filters, for `"lowrank"`.
        conv_head_size (`int`, defaults to 16): Channels that share one filter, for `"headwise"`.
        conv_static (`bool`, defaults to `True`): Add a static filter to the dynamic one.
        conv_residual (`bool`, defaults to `True`): Add the input of the convolution to its output.
        conv_layers (`list[int]`, *optional*): Decoder layers that get convolutions; None: all.
        conv_init (`str`, defaults to `"uniform"`):
            How new convolutions start. `"uniform"`: the static filter is drawn from U(-1/sqrt(W), 1/sqrt(W)) and the
            dynamic part starts at zero output, as in the paper. `"identity"`: both are zero, so that the model starts
            as the Llama it extends.
        conv_recompute (`bool`, defaults to `False`):
            Trade time for memory in training: what the convolutions read is not kept for the backward pass but made
            again from the input of the linear layer. In training mode no cache is made then, and with a cache given
            nothing is made again.
        conv_fused (`bool`, defaults to `True`):
            Make the filters after Q, K and V (gate and up) in one product, and with `conv_mode="lowrank"` convolve
            and rotate them in one call of the kernels. `False` calls every convolution by itself, and transformers'
            own `apply_rotary_pos_emb`. Like `conv_recompute` it says how the model is computed, not which model it
            is, and may be changed at any time: `model.config.conv_fused = False`.

    Raises:
        TypeError, ValueError: a `conv_*` field does not fit; the message names the field, the value and what is
            allowed.

    Source: Sieberling, Runwal, Panda, Kim, "Dynamic Short Convolutions Improve Transformers", arXiv 2606.03825.

    Example:

    ```python
    >>> from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM

    >>> config = DynConvLlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4)
    >>> model = DynConvLlamaForCausalLM(config)
    ```
    """

    model_type = "dynconv_llama"

    conv_targets: list[str] | str = ("q_proj", "k_proj", "v_proj")
    conv_mode: str = "lowrank"
    conv_kernel_size: int = 4
    conv_rank: int = 15
    conv_head_size: int = 16
    conv_static: bool = True
    conv_residual: bool = True
    conv_layers: list[int] | None = None
    conv_init: str = "uniform"
    conv_recompute: bool = False
    conv_fused: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # Both follow from the convolution fields, so a checkpoint cannot say otherwise.
        kwargs.pop("layer_types", None)
        kwargs.pop("number_of_conv_states", None)
        # Before the base class, which in some releases reads the tensor parallel plan.
        self.conv_targets = _canonical_targets(self.conv_targets)
        self.conv_layers = _canonical_layers(self.conv_layers, self.num_hidden_layers)
        _check_choice("conv_mode", self.conv_mode, CONV_MODES)
        super().__post_init__(**kwargs)
        self._check_conv_fields()
        register_with_liger()

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches hold for each layer: "hybrid" is keys and values beside convolution states."""
        # Fields are read once: every attribute of a config costs a look into transformers' renamed ones, and a
        # generated token asks for all layers. A single tap looks at no earlier token and has no state.
        layers, conv_layers = range(self.num_hidden_layers), self.conv_layers
        if self.conv_kernel_size == 1:
            return ["full_attention" for _ in layers]
        if conv_layers is None:
            return ["hybrid" for _ in layers]
        return ["hybrid" if layer_idx in conv_layers else "full_attention" for layer_idx in layers]

    @property
    def number_of_conv_states(self) -> int:
        """Convolution states that transformers' caches hold for a "hybrid" layer: one for each target."""
        return len(self.conv_targets)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Llama's tensor parallel plan, and rules for the convolutions after the layers it divides."""
        plan = dict(self.__dict__.get("base_model_tp_plan", LlamaConfig.base_model_tp_plan))
        for linear, style in LlamaConfig.base_model_tp_plan.items():
            if linear.rsplit(".", 1)[-1] in self.conv_targets:
                plan |= _conv_tp_plan(conv_name(linear), style, self.conv_mode)
        return plan

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        # Some releases of transformers, and some quantisers, add rules to the plan. Under its own name, a plan is
        # what transformers leaves out of config.json.
        self.__dict__["base_model_tp_plan"] = plan

    def has_conv(self, layer_idx: int) -> bool:
        """Whether decoder layer `layer_idx` has convolutions."""
        return self.conv_layers is None or layer_idx in self.conv_layers

    def linear_features(self, target: str) -> tuple[int, int]:
        """(in_features, out_features) of the linear layer `target`, one of the names allowed in `conv_targets`."""
        query_size = self.num_attention_heads * self.head_dim
        key_value_size = self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (self.hidden_size, query_size),
            "k_proj": (self.hidden_size, key_value_size),
            "v_proj": (self.hidden_size, key_value_size),
            "o_proj": (query_size, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }[target]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a plain Llama's config is one to add fields to, of which transformers need not warn.

        PEFT reads the base of an adapter in this way. That a plain Llama has no weights for convolutions is for the
        models to say, and they do.
        """
        fields, kwargs = super().get_config_dict(*args, **kwargs)
        if fields.get("model_type") == LlamaConfig.model_type:
            fields["model_type"] = cls.model_type
        return fields, kwargs

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and beside config.json the code that `trust_remote_code=True` loads.

        Raises:
            ValueError: a file in the way of that code is somebody else's; nothing is written then.
        """
        if type(self) is DynConvLlamaConfig:
            # What a user's own model class has registered for itself stays.
            self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
            write_code(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """Only what is newer is pushed; the code beside the config has just been written, and is to be."""
        timestamps = super()._get_files_timestamps(working_dir)
        return {file: timestamp for file, timestamp in timestamps.items() if file not in code_files()}

    def _check_conv_fields(self) -> None:
        _check_choice("conv_init", self.conv_init, CONV_INITS)
        _check_int("conv_kernel_size", self.conv_kernel_size, maximum=MAX_KERNEL_SIZE)
        _check_int("conv_rank", self.conv_rank)
        _check_int("conv_head_size", self.conv_head_size)
        _check_bool("conv_static", self.conv_static)
        _check_bool("conv_residual", self.conv_residual)
        _check_bool("conv_recompute", self.conv_recompute)
        _check_bool("conv_fused", self.conv_fused)
        if self.conv_mode == "static" and not self.conv_static:
            raise ValueError('conv_static must be True with conv_mode="static", which has no other filter; got False')
        if self.conv_init == "identity" and not self.conv_residual:
            raise ValueError(
                'conv_residual must be True with conv_init="identity": without it, zero filters give a zero output; '
                'got False. Use conv_init="uniform", or conv_residual=True'
            )
        if self.conv_mode == "headwise":
            self._check_head_size()

    def _check_head_size(self) -> None:
        for target in self.conv_targets:
            _, channels = self.linear_features(target)
            if channels % self.conv_head_size:
                raise ValueError(
                    f"conv_head_size must divide the output channels of every layer in conv_targets, got "
                    f"{self.conv_head_size} for {target} with {channels} channels"
                )


def conv_name(target: str) -> str:
    """The convolution that follows the linear layer `target`: "q_conv" for "q_proj"."""
    return target.removesuffix("_proj") + "_conv"


def _conv_tp_plan(conv: str, linear_style: str, mode: str) -> dict[str, str]:
    """The rules for the convolution named `conv`, which follows a linear layer of style "colwise" or "rowwise"."""
    filter_proj = f"{conv}.filter_proj"
    if linear_style == "rowwise":
        # All channels on every rank, but filters from hidden states of which each rank has a slice.
        return {} if mode == "static" else {filter_proj: "rowwise"}
    filter_rules = {"lowrank": {filter_proj: COEFFICIENTS_STYLE}, "headwise": {filter_proj: "colwise"}, "static": {}}
    return {conv: CHANNELS_STYLE, **filter_rules[mode]}


def _canonical_targets(targets: list[str] | str) -> list[str]:
    """The targets in the order of the model, whatever the order they were named in."""
    allowed = f'a non-empty list of names among {list(CONV_TARGETS)}, or "all-linear"'
    if targets == "all-linear":
        return list(CONV_TARGETS)
    if not isinstance(targets, list | tuple):
        raise TypeError(f"conv_targets must be {allowed}, got {targets!r}")
    unknown = [target for target in targets if target not in CONV_TARGETS]
    if unknown or not targets:
        raise ValueError(f"conv_targets must be {allowed}, got {list(targets)!r}")
    return [target for target in CONV_TARGETS if target in targets]


def _canonical_layers(layers: list[int] | None, num_hidden_layers: int) -> list[int] | None:
    if layers is None:
        return None
    allowed = f"None (all layers) or a non-empty list of layer indices from 0 to {num_hidden_layers - 1}"
    if not isinstance(layers, list | tuple) or not all(type(layer) is int for layer in layers):
        raise TypeError(f"conv_layers must be {allowed}, got {layers!r}")
    if not layers or not all(0 <= layer < num_hidden_layers for layer in layers):
        raise ValueError(f"conv_layers must be {allowed}, got {list(layers)!r}")
    return sorted(set(layers))


def _check_choice(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} must be one of {list(allowed)}, got {value!r}")


def _check_int(field: str, value: Any, maximum: int | None = None) -> None:
    allowed = "an integer of at least 1" if maximum is None else f"an integer from 1 to {maximum}"
    if type(value) is not int:
        raise TypeError(f"{field} must be {allowed}, got {value!r}")
    if value < 1 or (maximum is not None and value > maximum):
        raise ValueError(f"{field} must be {allowed}, got {value!r}")


def _check_bool(field: str, value: Any) -> None:
    if type(value) is not bool:
        raise TypeError(f"{field} must be True or False, got {value!r}")
