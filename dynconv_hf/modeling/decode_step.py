"""One token of a group of convolutions in one launch, filters, states and RoPE included: where it serves.

Everything else takes the way over the whole sequence's operation, which gives the same.
"""

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from ..kernels import Rotary
from ..kernels.decode_ops import MAX_GROUP, decode_step
from ..kernels.decode_reference import decode_step_reference
from ..kernels.dispatch import select_implementation
from .conv_group import can_bypass_calls
from .dynamic_conv import DynamicShortConv

if TYPE_CHECKING:
    from .modeling_dynconv_llama import ConvolvedProjections

__all__ = ["step_group"]


def step_group(
    owner: "ConvolvedProjections",
    convs: dict[str, DynamicShortConv],
    xs: list[torch.Tensor],
    hidden_states: torch.Tensor,
    positions: torch.Tensor | None,
    cache: Cache | None,
    rotary: Rotary | None,
) -> list[torch.Tensor] | None:
    """The convolutions `convs`, by target, of `xs`, (B, 1, D) each, for one token, then `rotary`.

    The states in the cache are left as `update_conv_state` leaves them. None where one launch does not serve; nothing
    has happened then.
    """
    if cache is None or hidden_states.shape[1] != 1 or torch.is_grad_enabled() or not 0 < len(convs) <= MAX_GROUP:
        return None
    modules = list(convs.values())
    implementation = select_implementation(xs[0], "auto").name
    if implementation == "reference" and (xs[0].device.type != "cpu" or torch.compiler.is_compiling()):
        return None
    if not can_bypass_calls(modules, xs) or modules[0].mode != "lowrank" or modules[0].kernel_size == 1:
        return None
    weights = [conv.filter_proj.weight for conv in modules]
    bases = [conv.basis for conv in modules]
    static_filters = [conv.static_filter for conv in modules if conv.static_filter is not None]
    if not _serves(bases, static_filters, xs[0], hidden_states):
        return None
    states = _states(owner, convs, xs, cache)
    if states is None:
        return None
    tensors = (hidden_states, xs, weights, bases, static_filters, states, positions)
    if implementation == "reference":
        return decode_step_reference(*tensors, rotary, modules[0].residual)
    cos, sin, head_dim, rotated = rotary or (None, None, 0, [False] * len(convs))
    outputs = decode_step(*tensors, cos, sin, head_dim, list(rotated), modules[0].residual)
    return list(outputs[: len(convs)])


def _serves(
    bases: list[torch.Tensor], static_filters: list[torch.Tensor], x: torch.Tensor, hidden_states: torch.Tensor
) -> bool:
    """Whether the kernel takes tensors of these dtypes and devices."""
    basis = bases[0]
    if not basis.device == hidden_states.device == x.device or torch.is_autocast_enabled(x.device.type):
        return False
    for other in bases[1:]:
        if other.dtype != basis.dtype or other.device != basis.device:
            return False
    return all(static_filter.dtype == static_filters[0].dtype for static_filter in static_filters[1:])


def _states(
    owner: "ConvolvedProjections", convs: dict[str, DynamicShortConv], xs: list[torch.Tensor], cache: Cache
) -> list[torch.Tensor] | None:
    """The convolutions' states in the cache; None where one is not what the kernel shifts in place."""
    layer = cache.layers[owner.layer_idx]
    if cache.offloading or layer.record_past:
        return None
    states = []
    for (target, conv), x in zip(convs.items(), xs, strict=True):
        state_idx = owner.conv_state_idx[target]
        if not layer.has_previous_state[state_idx]:
            return None
        state = layer.conv_states[state_idx]
        if state.shape != (x.shape[0], x.shape[2], conv.kernel_size - 1) or not state.is_contiguous():
            return None
        if state.dtype != x.dtype or state.device != x.device:
            return None
        states.append(state)
    return states
