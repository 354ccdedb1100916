"""What a cache holds for a layer with convolutions: keys, values and the convolutions' last inputs, as one thing.

transformers' hybrid layers keep keys and values beside states that are made for recurrent models, and several of their
methods move the one without the other. A cache made with `DynamicCache(config=...)` or `StaticCache(config=...)` has
such layers; `adopt_layers` makes them ours when the model first meets the cache, so that every method of the cache
from then on does right by the convolutions or refuses.

Shape suffixes: B batch, D channels, L inputs that a state holds: W - 1, more while the past is recorded.
"""

import torch
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

__all__ = ["DynamicConvLayer", "StaticConvLayer", "adopt_layers", "check_states", "end_past_recording"]


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
        tokens = -tokens_to_remove
        if tokens > 0 and self.record_past:
            self._check_recorded(tokens)
        if self.record_past and any(self.has_previous_state.values()):
            for state_idx, state_BDL in self.conv_states.items():
                if state_BDL is not None:
                    kept = state_BDL.shape[-1] - max(tokens, 0)
                    width = self.conv_kernel_size[state_idx]
                    self.conv_states[state_idx] = state_BDL[..., max(kept - width, 0) : kept]
            DynamicLayer.crop(self, tokens_to_remove)
            return
        super().crop(tokens_to_remove)

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


def adopt_layers(cache: Cache, layer_types: list[str]) -> None:
    """Makes the layers of `cache` that hold states of convolutions ours; those of another class are left alone.

    Raises:
        ValueError: a static cache is exported, whose states a program would make anew in every call.
    """
    if is_dynamo_compiling():
        # Dynamo cannot follow a change of class; such a cache becomes ours in the next call that is not compiled.
        return
    for layer, layer_type in zip(cache.layers, layer_types, strict=False):
        if layer_type == "hybrid" and type(layer) in OUR_LAYERS:
            # The object stays: users, offloading and beam search hold references to the layers of a cache.
            layer.__class__ = OUR_LAYERS[type(layer)]
    if is_exporting() and any(type(layer) in OUR_LAYERS.values() for layer in cache.layers):
        raise ValueError(
            f"torch.export with a cache ({type(cache).__name__}) is not supported: the exported program would not "
            "keep the states of the convolutions from call to call. Export without a cache (use_cache=False), or use "
            'generate(cache_implementation="static"), which compiles the model'
        )


def check_states(cache: Cache, layer_types: list[str], batch: int) -> None:
    """Checks, before anything is written, that the cache has the states that its cached tokens ask for.

    Raises:
        ValueError: a state is missing, has other rows than the input, or holds fewer inputs than a convolution reads.
    """
    if is_compiling():
        return
    leaves_inference_mode = not torch.is_inference_mode_enabled()
    for layer_idx, (layer, layer_type) in enumerate(zip(cache.layers, layer_types, strict=False)):
        if layer_type != "hybrid":
            continue
        # The length of a static layer is a tensor, which would have to be fetched from the GPU.
        length = layer.get_seq_length() if isinstance(layer, DynamicConvLayer) else 0
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


def end_past_recording(cache: Cache) -> None:
    """Ends what `activate_past_recording` began: the states hold the last W - 1 inputs again."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicConvLayer) or not layer.record_past:
            continue
        for state_idx, state_BDL in layer.conv_states.items():
            if state_BDL is None:
                continue
            width = layer.conv_kernel_size[state_idx]
            missing = max(width - state_BDL.shape[-1], 0)
            last_BDL = state_BDL[..., max(state_BDL.shape[-1] - width, 0) :]
            layer.conv_states[state_idx] = torch.nn.functional.pad(last_BDL, (missing, 0)).contiguous()
        layer.record_past = False


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
