"""The low-rank convolution of a group of tensors where no kernel does them together: each by the kernels of one.

Rotations are in eager PyTorch. Serves every call.
"""

from collections.abc import Sequence

import torch

from .ops import lowrank_kernels
from .rotary import Rotary, rotate, rotate_back

__all__ = ["backward_group", "forward_group"]


def forward_group(
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor] | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_states: Sequence[torch.Tensor] | None,
    rotary: Rotary | None,
) -> list[torch.Tensor]:
    """ys, (B, T, D_g) each."""
    ys = []
    for g, x in enumerate(xs):
        filters, state = _of_one(g, coefficients, bases, static_filters, initial_states)
        kernels, _ = lowrank_kernels(x, *filters, positions, state)
        y = kernels.forward(x, *filters, residual, positions, state)
        ys.append(rotate(y, rotary) if rotary is not None and rotary.rotated[g] else y)
    return ys


def backward_group(
    dys: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor] | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_states: Sequence[torch.Tensor] | None,
    rotary: Rotary | None,
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor], list[torch.Tensor] | None, list[torch.Tensor] | None]:
    """dxs, dcoefficients, dbases, dstatic_filters, dinitial_states."""
    found = []
    for g, (dy, x) in enumerate(zip(dys, xs, strict=True)):
        filters, state = _of_one(g, coefficients, bases, static_filters, initial_states)
        kernels, _ = lowrank_kernels(x, *filters, positions, state)
        dy = rotate_back(dy, rotary) if rotary is not None and rotary.rotated[g] else dy
        found.append(kernels.backward(dy, x, *filters, residual, positions, state))
    dxs, dcoefficients, dbases, dstatics, dstates = (list(gradients) for gradients in zip(*found, strict=True))
    dcoefficients = torch.stack(dcoefficients, dim=2)
    return dxs, dcoefficients, dbases, dstatics if static_filters else None, dstates if initial_states else None


def _of_one(
    g: int,
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor] | None,
    initial_states: Sequence[torch.Tensor] | None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
    static_filter = static_filters[g] if static_filters else None
    return (coefficients[:, :, g], bases[g], static_filter), initial_states[g] if initial_states else None
