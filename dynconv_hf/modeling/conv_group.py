"""Convolutions whose filters come from the same hidden states, as after Q, K and V: made together.

Their filters are one matrix product, and in mode "lowrank" they are one call of the operation. This goes past the
modules' own calls, and so it is for modules whose calls do nothing else: `can_bypass_calls` tells.

Shape suffixes: B batch, T tokens, G tensors of a group, R rank, W kernel size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import Rotary, lowrank_dynamic_conv1d_group
from .dynamic_conv import (
    DynamicShortConv,
    FilterProjection,
    has_plain_parameters,
    is_token_on_cpu,
    padded_rows,
    stack_rows,
)

__all__ = ["can_bypass_calls", "can_group", "convolve_group", "rotary_of_group"]


def can_group(convs: Sequence[nn.Module], xs: Sequence[torch.Tensor]) -> bool:
    """Whether there is something to do together, and `convolve_group` does what these convolutions' calls would do."""
    return len(convs) > 1 and can_bypass_calls(convs, xs)


def can_bypass_calls(convs: Sequence[nn.Module], xs: Sequence[torch.Tensor]) -> bool:
    """Whether these convolutions are of one kind, and their calls do nothing but convolve.

    Not where somebody listens to a call or has put something else in its place: hooks, wrappers of PEFT, offloading,
    tensor parallelism, a convolution that FSDP divides by itself.
    """
    for conv in convs:
        if not _is_untouched(conv, DynamicShortConv) or not _is_untouched(conv.filter_proj, FilterProjection):
            return False
    if len(convs) == 1:
        return True
    kind, x = _kind(convs[0]), xs[0]
    return all(_kind(conv) == kind for conv in convs[1:]) and all(
        other.dtype == x.dtype and other.device == x.device for other in xs[1:]
    )


def convolve_group(
    convs: Sequence[DynamicShortConv],
    xs: Sequence[torch.Tensor],
    hidden_states: torch.Tensor,
    positions: torch.Tensor | None,
    initial_states: Sequence[torch.Tensor | None],
    rotary: Rotary | None = None,
) -> list[torch.Tensor]:
    """What the calls of `convs` give for `xs`; then `rotary`, which is for mode "lowrank"."""
    weights = [conv.filter_proj.weight for conv in convs]
    hidden_states = hidden_states.to(weights[0].dtype)
    if convs[0].mode == "lowrank":
        coefficients_BTGR = _coefficients(hidden_states, weights)
        return lowrank_dynamic_conv1d_group(
            xs,
            coefficients_BTGR,
            [conv.basis for conv in convs],
            static_filters=None if convs[0].static_filter is None else [conv.static_filter for conv in convs],
            residual=convs[0].residual,
            positions=positions,
            # The cache has all of them, or, at its start, none.
            initial_states=None if initial_states[0] is None else initial_states,
            rotary=rotary,
        )
    return [
        conv.convolve(x, part, positions=positions, initial_state=state)
        for conv, x, part, state in zip(convs, xs, _filters(hidden_states, weights), initial_states, strict=True)
    ]


def _coefficients(hidden_states: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """(B, T, G, R): what each of G weights (R, hidden_size) makes."""
    if is_token_on_cpu(hidden_states):
        return torch.stack([F.linear(hidden_states, weight) for weight in weights], dim=2)
    product = F.linear(hidden_states, stack_rows(weights))
    return product.unflatten(-1, (len(weights), -1))[..., : weights[0].shape[0]]


def _filters(hidden_states: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """(B, T, H * W) for each of the weights (H * W, hidden_size), which may differ in H."""
    if is_token_on_cpu(hidden_states):
        return [F.linear(hidden_states, weight) for weight in weights]
    product = F.linear(hidden_states, stack_rows(weights))
    # `split`, because the backward of slices would add up tensors that are zero nearly everywhere.
    parts = product.split([padded_rows(weight) for weight in weights], dim=-1)
    return [part[..., : weight.shape[0]] for part, weight in zip(parts, weights, strict=True)]


def rotary_of_group(rotary: Rotary, xs: dict[str, torch.Tensor], convs: dict[str, DynamicShortConv]) -> Rotary | None:
    """The rotation of `xs` as one for the tensors that `convs` convolve; None where it is not to be fused.

    Args:
        rotary: which of `xs` are rotated, and how.
        xs: the outputs of linear layers, by target.
        convs: the convolutions after some of them, by target; a group.
    """
    # A list: in torch 2.11, Dynamo cannot compare sets.
    rotated = [target for target, turns in zip(xs, rotary.rotated, strict=True) if turns]
    fits = rotary.cos.shape[-1] == rotary.head_dim and all(
        target in convs and xs[target].dtype == rotary.cos.dtype == rotary.sin.dtype for target in rotated
    )
    if not fits or any(conv.mode != "lowrank" for conv in convs.values()):
        return None
    return rotary._replace(rotated=tuple(target in rotated for target in convs))


def _is_untouched(module: nn.Module, expected: type[nn.Module]) -> bool:
    return (
        type(module) is expected
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and has_plain_parameters(module)
    )


def _kind(conv: DynamicShortConv) -> tuple[Any, ...]:
    """What the convolutions of a group have in common."""
    weight = conv.filter_proj.weight
    shape = weight.shape if conv.mode == "lowrank" else None
    return conv.mode, conv.kernel_size, conv.residual, conv.static_filter is None, weight.dtype, weight.device, shape
