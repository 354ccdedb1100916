"""The decode step in eager PyTorch: what `decode_step` computes, and the path for a token on a CPU.

On a CPU a token's time is the number of calls, not their arithmetic: all taps of a convolution are one product.

Shape suffixes: B batch, D channels, W kernel size, R rank.
"""

import torch
import torch.nn.functional as F

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

    The states are shifted in place. Without gradients.
    """
    hidden_BH = hidden_states[:, 0].to(filter_weights[0].dtype)
    ys = []
    for g, x_B1D in enumerate(xs):
        static_filter_WD = static_filters[g] if static_filters else None
        filters_BDW = _filters(F.linear(hidden_BH, filter_weights[g]), bases[g], static_filter_WD, x_B1D.dtype)
        y_B1D = _convolve(x_B1D, filters_BDW, states[g], positions, residual)
        ys.append(rotate(y_B1D, rotary) if rotary is not None and rotary.rotated[g] else y_B1D)
    return ys


def _filters(
    coefficients_BR: torch.Tensor, basis_RWD: torch.Tensor, static_filter_WD: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """(B, D, W), the oldest tap first as in a state, in the dtype that sums are made in."""
    dtype = torch.promote_types(dtype, torch.float32)
    coefficients_BR, basis_RN = coefficients_BR.to(dtype), basis_RWD.to(dtype).flatten(1)
    if static_filter_WD is None:
        filters_BN = coefficients_BR @ basis_RN
    else:
        filters_BN = torch.addmm(static_filter_WD.to(dtype).flatten(), coefficients_BR, basis_RN)
    return filters_BN.unflatten(-1, basis_RWD.shape[1:]).flip(1).transpose(1, 2)


def _convolve(
    x_B1D: torch.Tensor,
    filters_BDW: torch.Tensor,
    state_BDS: torch.Tensor,
    positions: torch.Tensor | None,
    residual: bool,
) -> torch.Tensor:
    history_BDW = torch.cat([state_BDS, x_B1D.transpose(1, 2)], dim=-1)
    state_BDS.copy_(history_BDW[..., 1:])
    terms_BDW = filters_BDW * history_BDW
    if positions is not None:
        # `where`, not a product with the mask: what lies outside a token's sequence may be inf or nan.
        back_W = torch.arange(filters_BDW.shape[-1] - 1, -1, -1, device=positions.device)
        terms_BDW = torch.where((positions >= back_W).unsqueeze(1), terms_BDW, 0.0)
    y_B1D = terms_BDW.sum(dim=-1).unsqueeze(1)
    return (y_B1D + x_B1D if residual else y_B1D).to(x_B1D.dtype)
