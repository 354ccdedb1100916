"""The decode step in eager PyTorch: what `decode_step` computes, and the path for a token on a CPU.

Shape suffixes: B batch, D channels, S = W - 1 inputs of a state.
"""

import torch
import torch.nn.functional as F

from .reference import accumulation_dtype, convolve_one_token, lowrank_token_filters
from .rotary import Rotary, rotate

__all__ = ["decode_step_reference"]


def decode_step_reference(
    hidden_states: torch.Tensor,
    xs: list[torch.Tensor],
    filter_weights: list[torch.Tensor],
    bases: list[torch.Tensor],
    static_filters: list[torch.Tensor],
    states: list[torch.Tensor],
    positions: torch.Tensor | None,
    rotary: Rotary | None,
    residual: bool,
) -> list[torch.Tensor]:
    """One token of a group of low-rank convolutions; arguments, shapes and dtypes are those of `decode_step`.

    The states are shifted in place. Without gradients. The tensors of a group are convolved and rotated side by side:
    for one token, a call costs more than what it computes.
    """
    sizes, dtype = [x_B1D.shape[-1] for x_B1D in xs], accumulation_dtype(xs[0])
    filters_BWD = _side_by_side(_filters(hidden_states[:, 0], filter_weights, bases, static_filters, dtype))
    history_BDW = torch.cat([_side_by_side(states, dim=1), _side_by_side(xs).transpose(1, 2)], dim=-1)
    history_BWD = history_BDW.transpose(1, 2).to(dtype)
    y_BD = convolve_one_token(history_BWD, filters_BWD, residual, positions)
    for state_BDS, shifted_BDS in zip(states, _apart(history_BDW[..., 1:], sizes, dim=1), strict=True):
        state_BDS.copy_(shifted_BDS)
    ys = _apart(y_BD.to(xs[0].dtype).unsqueeze(1), sizes)
    return ys if rotary is None else _rotate_together(ys, rotary)


def _filters(
    hidden_BN: torch.Tensor,
    filter_weights: list[torch.Tensor],
    bases: list[torch.Tensor],
    static_filters: list[torch.Tensor],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """(B, W, D) each, in `dtype`; the coefficients are rounded to that of their weights before."""
    hidden_BN = hidden_BN.to(filter_weights[0].dtype)
    return [
        lowrank_token_filters(F.linear(hidden_BN, weight_RN).to(dtype), basis_RWD.to(dtype), static_filter_WD)
        for weight_RN, basis_RWD, static_filter_WD in zip(
            filter_weights, bases, static_filters or [None] * len(bases), strict=True
        )
    ]


def _rotate_together(ys: list[torch.Tensor], rotary: Rotary) -> list[torch.Tensor]:
    rotated = [g for g, turns in enumerate(rotary.rotated) if turns]
    if not rotated:
        return ys
    turned = rotate(_side_by_side([ys[g] for g in rotated]), rotary)
    for g, y_B1D in zip(rotated, _apart(turned, [ys[g].shape[-1] for g in rotated]), strict=True):
        ys[g] = y_B1D
    return ys


def _side_by_side(tensors: list[torch.Tensor], dim: int = -1) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)


def _apart(tensor: torch.Tensor, sizes: list[int], dim: int = -1) -> list[torch.Tensor]:
    return [tensor] if len(sizes) == 1 else list(tensor.split_with_sizes(sizes, dim))
