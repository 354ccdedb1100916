"""The low-rank convolution of a group of tensors where no kernel does them together: each by the kernels of one.

Rotations are in eager PyTorch. Serves every call.
"""

from collections.abc import Sequence

import torch

from .ops import lowrank_kernels
from .rotary import Rotary, rotate, rotate_back

__all__ = ["backward_group", "forward_group", "launched"]


def launched(
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor | None],
    positions: torch.Tensor | None,
    initial_states: Sequence[torch.Tensor | None],
) -> str:
    """The kernels of each tensor by name: "lowrank_one_by_one: lowrank_half, lowrank_half, lowrank"."""
    names = []
    for g, x in enumerate(xs):
        inputs = (x, coefficients[:, :, g], bases[g], static_filters[g])
        kernels, _ = lowrank_kernels(*inputs, positions, initial_states[g])
        names.append(kernels.name())
    return f"lowrank_one_by_one: {', '.join(names)}"


def forward_group(
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor | None],
    residual: bool,
    positions: torch.Tensor | None,
    initial_states: Sequence[torch.Tensor | None],
    rotary: Rotary | None,
) -> list[torch.Tensor]:
    """ys, (B, T, D_g) each."""
    ys = []
    for g, x in enumerate(xs):
        inputs = (x, coefficients[:, :, g], bases[g], static_filters[g])
        kernels, _ = lowrank_kernels(*inputs, positions, initial_states[g])
        y = kernels.forward(*inputs, residual, positions, initial_states[g])
        ys.append(rotate(y, rotary) if rotary is not None and rotary.rotated[g] else y)
    return ys


def backward_group(
    dys: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor | None],
    residual: bool,
    positions: torch.Tensor | None,
    initial_states: Sequence[torch.Tensor | None],
    rotary: Rotary | None,
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor | None]]:
    """dxs, dcoefficients, dbases, dstatic_filters, dinitial_states."""
    found = []
    for g, (dy, x) in enumerate(zip(dys, xs, strict=True)):
        inputs = (x, coefficients[:, :, g], bases[g], static_filters[g])
        kernels, _ = lowrank_kernels(*inputs, positions, initial_states[g])
        dy = rotate_back(dy, rotary) if rotary is not None and rotary.rotated[g] else dy
        found.append(kernels.backward(dy, *inputs, residual, positions, initial_states[g]))
    dxs, dcoefficients, dbases, dstatics, dstates = (list(gradients) for gradients in zip(*found, strict=True))
    return dxs, torch.stack(dcoefficients, dim=2), dbases, dstatics, dstates
