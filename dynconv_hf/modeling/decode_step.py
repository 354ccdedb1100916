"""One token of attention's convolutions in one launch: when that is possible, and the call.

Everything else takes the way over the convolutions' own forward passes, which gives the same.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..kernels.decode_ops import decode_step
from ..kernels.dispatch import select_implementation
from .configuration_dynconv_llama import conv_name
from .dynamic_conv import DynamicShortConv, FilterProjection

if TYPE_CHECKING:
    from .modeling_dynconv_llama import DynConvLlamaAttention

__all__ = ["decode_heads"]

_TARGETS = ("q_proj", "k_proj", "v_proj")


def decode_heads(
    attention: "DynConvLlamaAttention",
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor | None,
    cache: Cache | None,
) -> tuple[torch.Tensor, ...] | None:
    """Queries and keys, turned by RoPE, and values of one token: (B, heads, 1, head_dim) each.

    The states in the cache are left as the convolutions' own forward passes leave them. None where one launch does
    not serve; nothing has happened then.
    """
    if hidden_states.shape[1] != 1 or torch.is_grad_enabled() or cache is None:
        return None
    convs = {target: getattr(attention, conv_name(target)) for target in _TARGETS}
    convs = {target: conv for target, conv in convs.items() if conv is not None}
    cos, sin = position_embeddings
    if not convs or not _serves(list(convs.values()), hidden_states, cos):
        return None
    states = _states(attention, list(convs), cache, hidden_states)
    if states is None:
        return None

    xs = {target: getattr(attention, target)(hidden_states) for target in _TARGETS}
    rotates = "q_proj" in convs and "k_proj" in convs
    outputs = decode_step(
        hidden_states,
        [xs[target] for target in convs],
        [conv.filter_proj.weight for conv in convs.values()],
        [conv.basis for conv in convs.values()],
        [conv.static_filter for conv in convs.values() if conv.static_filter is not None],
        states,
        positions,
        cos if rotates else None,
        sin if rotates else None,
        attention.head_dim,
        [target != "v_proj" for target in convs],
        next(iter(convs.values())).residual,
    )
    xs.update(zip(convs, outputs, strict=True))
    query, key, value = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in xs.values())
    if not rotates:
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return query, key, value


def _serves(convs: list[nn.Module], hidden_states: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether the kernel computes what these convolutions would."""
    if not all(_is_plain(conv, hidden_states.device) for conv in convs):
        return False
    kinds = {
        (conv.basis.shape[:2], conv.residual, *(None if p is None else p.dtype for p in _parameters(conv)))
        for conv in convs
    }
    return (
        len(kinds) == 1
        and cos.dtype == hidden_states.dtype
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and select_implementation(hidden_states, "auto").name == "triton"
    )


def _is_plain(conv: nn.Module, device: torch.device) -> bool:
    """Whether the module does what its class says: neither wrapped, nor hooked, nor divided among devices."""
    if type(conv) is not DynamicShortConv or conv.mode != "lowrank" or conv.kernel_size == 1:
        return False
    if type(conv.filter_proj) is not FilterProjection or _is_hooked(conv) or _is_hooked(conv.filter_proj):
        return False
    return all(
        p is None or (type(p) in (nn.Parameter, torch.Tensor) and p.device == device) for p in _parameters(conv)
    )


def _is_hooked(module: nn.Module) -> bool:
    # accelerate's hooks are an attribute in place of the class's `forward`.
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _parameters(conv: DynamicShortConv) -> tuple[torch.Tensor | None, ...]:
    return conv.filter_proj.weight, conv.basis, conv.static_filter


def _states(
    attention: "DynConvLlamaAttention", targets: list[str], cache: Cache, hidden_states: torch.Tensor
) -> list[torch.Tensor] | None:
    """The states of these targets in the cache; None where one is not what the kernel shifts in place."""
    layer = cache.layers[attention.layer_idx]
    if cache.offloading or layer.record_past:
        return None
    states = []
    for target in targets:
        state_idx = attention.conv_state_idx[target]
        if not layer.has_previous_state[state_idx]:
            return None
        state = layer.conv_states[state_idx]
        _, kernel_size, channels = getattr(attention, conv_name(target)).basis.shape
        if (
            state.shape != (hidden_states.shape[0], channels, kernel_size - 1)
            or state.dtype != hidden_states.dtype
            or state.device != hidden_states.device
            or not state.is_contiguous()
        ):
            return None
        states.append(state)
    return states
