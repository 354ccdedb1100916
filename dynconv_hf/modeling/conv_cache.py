"""What a cache holds for a layer with convolutions: keys, values and the convolutions' last inputs, as one thing.

transformers' hybrid layers keep keys and values beside states that are made for recurrent models, and several of their
methods move the one without the other. A cache made with `DynamicCache(config=...)` or `StaticCache(config=...)` has
such layers; `prepare_cache` makes them ours when the model first meets the cache, so that every method of the cache
from then on does right by the convolutions or refuses.

Shape suffixes: B batch, T tokens, D channels, W kernel size, L inputs that a state holds: W - 1, more while the past
is recorded.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling, is_dynamo_compiling
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

__all__ = ["DynamicConvLayer", "StaticConvLayer", "end_past_recording", "exchange_conv_state", "prepare_cache"]


class DynamicConvLayer(LinearAttentionAndFullAttentionLayer):
    """Keys and values that grow, and the last inputs of each convolution."""

    def reset(self) -> None:
        """Forgets everything, so that the next sequence may have another batch size or dtype."""
        # transformers 5.17 only zeroes keys and values, whose length would go on counting.
        self.keys = self.values = None
        self.is_initialized = False
        record_past = self.record_past
        LinearAttentionCacheLayerMixin.__init__(self, self.number_of_states)
        self.record_past = record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` tokens back, from keys, values and states alike.

        Raises:
            RuntimeError: the past is not recorded.
            ValueError: a state no longer holds the inputs that lie before the removed tokens; nothing has changed.
        """
        if tokens_to_remove > 0 or not self.record_past:
            # transformers tells what is wrong.
            super().crop(tokens_to_remove)
            return
        self._check_recorded(-tokens_to_remove)
        if self.get_seq_length() == -tokens_to_remove:
            # Of a layer without tokens, transformers' methods leave the rows of keys and values as they are.
            self.reset()
            return
        for state_idx, state_BDL in self.conv_states.items():
            if state_BDL is not None:
                kept_BDL = state_BDL[..., : state_BDL.shape[-1] + tokens_to_remove]
                self.conv_states[state_idx] = _last(kept_BDL, self.conv_kernel_size[state_idx])
        DynamicLayer.crop(self, tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for state_idx, state_BDL in self.conv_states.items():
            if state_BDL is not None:
                self.conv_states[state_idx] = state_BDL.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        for state_idx, state_BDL in self.conv_states.items():
            if state_BDL is not None:
                self.conv_states[state_idx] = state_BDL[indices.to(state_BDL.device)]

    def _check_recorded(self, tokens: int) -> None:
        length = self.get_seq_length()
        for state_idx, state_BDL in self.conv_states.items():
            if state_BDL is None:
                continue
            needed = max(min(self.conv_kernel_size[state_idx], length - tokens), 0)
            recorded = max(state_BDL.shape[-1] - tokens, 0)
            if tokens > length or recorded < needed:
                raise ValueError(
                    f"crop({-tokens}) cannot be undone for the convolutions: of the {needed} inputs before the "
                    f"removed tokens, {recorded} are still recorded. A crop gives up what was recorded before it: "
                    "take back all tokens in one crop, or start again with cache.reset()"
                )


class StaticConvLayer(LinearAttentionAndStaticFullAttentionLayer):
    """Keys and values of a fixed length, and the last inputs of each convolution, at fixed addresses."""

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            f"crop({tokens_to_remove}) is not supported by a static cache: neither keys and values nor the states of "
            "the convolutions can be taken back; use DynamicCache(config=model.config)"
        )

    def activate_past_recording(self) -> None:
        raise ValueError(
            "a static cache cannot record past states of the convolutions for a rollback; "
            "use DynamicCache(config=model.config)"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError(
            f"batch_repeat_interleave({repeats}) would change the fixed batch size of a static cache with "
            "convolutions; use DynamicCache(config=model.config)"
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise ValueError(
            f"batch_select_indices with {len(indices)} rows would change the fixed batch size of a static cache with "
            "convolutions; use DynamicCache(config=model.config)"
        )


OUR_LAYERS = {
    LinearAttentionAndFullAttentionLayer: DynamicConvLayer,
    LinearAttentionAndStaticFullAttentionLayer: StaticConvLayer,
}


def prepare_cache(
    cache: Cache, layer_types: list[str], batch: int | None, own_layers: Sequence[int]
) -> int | torch.Tensor:
    """Makes the layers of `cache` ours, and checks, before anything is written, that it serves a call of `batch` rows.

    Args:
        cache: what the caller of a model gave.
        layer_types: of the model's config; "hybrid" are those with states of convolutions.
        batch: the rows of the input; None where the call has none, which is an error of the base class.
        own_layers: the layers that run in this process; in a pipeline, those of other stages stay empty here.

    Returns:
        The number of cached tokens; a tensor where the cache is static.

    Raises:
        ValueError: the cache has no place for states, or is exported; a state is missing, has other rows than the
            input, or holds fewer inputs than a convolution reads.
    """
    _check_place(cache, layer_types)
    # The flag, and not is_exporting(): in torch 2.9, Dynamo takes that for True in whatever it compiles.
    if torch.compiler._is_exporting_flag and "hybrid" in layer_types:
        raise ValueError(
            f"torch.export with a cache ({type(cache).__name__}) is not supported: the exported program would not "
            "keep the states of the convolutions from call to call. Export without a cache (use_cache=False), or use "
            'generate(cache_implementation="static"), which compiles the model'
        )
    for layer, layer_type in zip(cache.layers, layer_types, strict=False):
        if layer_type == "hybrid":
            _adopt(layer)
    tokens = cache.get_seq_length(own_layers[0]) if own_layers else 0
    if batch is not None and not is_compiling():
        _check_states(cache, layer_types, batch, own_layers, tokens)
    return tokens


def _adopt(layer: CacheLayerMixin) -> None:
    """Makes a layer that holds states of convolutions ours; one of another class is left alone."""
    # Dynamo cannot follow a change of class; such a layer becomes ours in the next call that is not compiled.
    if not is_dynamo_compiling() and type(layer) in OUR_LAYERS:
        # The object stays: users, offloading and beam search hold references to the layers of a cache.
        layer.__class__ = OUR_LAYERS[type(layer)]


def _check_states(
    cache: Cache, layer_types: list[str], batch: int, own_layers: Sequence[int], tokens: int | torch.Tensor
) -> None:
    """Checks that each layer holds `tokens` tokens, and the states that they ask for."""
    leaves_inference_mode = not torch.is_inference_mode_enabled()
    for layer_idx in own_layers:
        if layer_types[layer_idx] != "hybrid":
            continue
        layer = cache.layers[layer_idx]
        # The length of a static layer is a tensor, which would have to be fetched from the GPU.
        length = layer.get_seq_length() if isinstance(layer, DynamicConvLayer) else 0
        if isinstance(layer, DynamicConvLayer) and length != tokens:
            raise ValueError(
                f"past_key_values holds {tokens} tokens in layer {own_layers[0]}, but {length} in layer {layer_idx}, "
                "as after a crop that was refused in the middle. Fill a new cache by calling the model on these tokens"
            )
        if length and not any(layer.has_previous_state.values()):
            raise ValueError(
                f"past_key_values holds keys and values of {length} tokens in layer {layer_idx}, but no states of the "
                "convolutions: it was not filled by this model. Fill DynamicCache(config=model.config) by calling the "
                "model on these tokens"
            )
        for state_idx, state_BDL in layer.conv_states.items():
            if state_BDL is None or not layer.has_previous_state[state_idx]:
                continue
            rows, _, inputs = state_BDL.shape
            needed = min(layer.conv_kernel_size[state_idx], length)
            if rows != batch or inputs < needed:
                raise ValueError(_misfit(layer_idx, rows, batch, inputs, needed))
            if leaves_inference_mode and state_BDL.is_inference():
                # States are written in place, which torch refuses outside of inference mode for what it made within.
                layer.conv_states[state_idx] = state_BDL.clone()


def exchange_conv_state(
    cache: Cache, x_BTD: torch.Tensor, layer_idx: int, state_idx: int, kernel_size: int
) -> torch.Tensor | None:
    """Hands the inputs of this call to the cache; returns those before them, (B, W - 1, D), or None at the start."""
    # A cache that the base class made within this call has not been prepared.
    _adopt(cache.layers[layer_idx])
    if cache.offloading:
        _fetch_offloaded_state(cache, x_BTD, layer_idx, state_idx)
    width = kernel_size - 1
    history_BDL = cache.update_conv_state(
        x_BTD.transpose(1, 2), layer_idx, state_idx=state_idx, conv_kernel_size=width
    )
    # While past is recorded for a rollback, the cache holds more than W - 1 inputs, or, after one, fewer.
    past = history_BDL.shape[-1] - x_BTD.shape[1]
    if past == 0:
        return None
    state_BSD = history_BDL[..., max(past - width, 0) : past].transpose(1, 2)
    return F.pad(state_BSD, (0, 0, width - state_BSD.shape[1], 0))


def end_past_recording(cache: Cache) -> None:
    """Ends what `activate_past_recording` began: the states hold the last W - 1 inputs again."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicConvLayer) or not layer.record_past:
            continue
        for state_idx, state_BDL in layer.conv_states.items():
            if state_BDL is None:
                continue
            width = layer.conv_kernel_size[state_idx]
            last_BDL = _last(state_BDL, width)
            layer.conv_states[state_idx] = F.pad(last_BDL, (width - last_BDL.shape[-1], 0)).contiguous()
        layer.record_past = False


def _last(state_BDL: torch.Tensor, width: int) -> torch.Tensor:
    """The last `width` inputs, or all where there are fewer."""
    return state_BDL[..., max(state_BDL.shape[-1] - width, 0) :]


def _misfit(layer_idx: int, rows: int, batch: int, inputs: int, needed: int) -> str:
    if rows != batch:
        return (
            f"past_key_values holds the convolutions' states of {rows} rows in layer {layer_idx}, but the input has "
            f"{batch} rows; use cache.batch_repeat_interleave or cache.batch_select_indices, or a new cache"
        )
    return (
        f"past_key_values holds the last {inputs} inputs of a convolution in layer {layer_idx}, but it reads {needed} "
        "at this length: the states were cut. Fill a new cache by calling the model on these tokens"
    )


def _check_place(cache: Cache, layer_types: list[str]) -> None:
    for layer_idx, layer_type in enumerate(layer_types):
        if layer_type != "hybrid":
            continue
        if layer_idx >= len(cache.layers) or not hasattr(cache.layers[layer_idx], "update_conv_state"):
            raise ValueError(
                f"past_key_values ({type(cache).__name__}) has no place for the states of the convolutions in "
                f"layer {layer_idx}; make the cache with the model's config, as in "
                "DynamicCache(config=model.config) or StaticCache(config=model.config, max_cache_len=...). "
                "PEFT's prefix tuning makes such a cache itself and is not supported: use LoRA, as "
                "dynconv_hf.lora_config sets it up"
            )
        if cache.offloading and cache.is_compileable:
            raise ValueError(
                f"past_key_values is an offloaded {type(cache).__name__}, which never brings layers with states "
                'of convolutions back to the GPU; use cache_implementation="offloaded" or "static"'
            )
        return


def _fetch_offloaded_state(cache: Cache, x_BTD: torch.Tensor, layer_idx: int, state_idx: int) -> None:
    """An offloaded cache brings a layer back for its keys and values only: some states are read before or after."""
    torch.cuda.current_stream(x_BTD.device).wait_stream(cache.prefetch_stream)
    states = cache.layers[layer_idx].conv_states
    if states[state_idx] is not None:
        states[state_idx] = states[state_idx].to(x_BTD.device)
