"""The low-rank convolution of several tensors with the same tokens, as of Q, K and V, in one call."""

from collections.abc import Sequence

import torch

from . import ops
from .dispatch import Implementation, select_implementation
from .reference import lowrank_group_reference
from .rotary import Rotary
from .validation import (
    check_common,
    check_device,
    check_floating,
    check_input,
    check_kernel_size,
    check_rank,
)

__all__ = ["lowrank_dynamic_conv1d_group"]


def lowrank_dynamic_conv1d_group(
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    *,
    static_filters: Sequence[torch.Tensor] | None = None,
    residual: bool = True,
    positions: torch.Tensor | None = None,
    initial_states: Sequence[torch.Tensor] | None = None,
    rotary: Rotary | None = None,
    impl: Implementation = "auto",
) -> list[torch.Tensor]:
    """[`lowrank_dynamic_conv1d`] of several tensors with the same tokens, each with a filter of its own.

    Where `rotary` says so, rotary position embedding follows the convolution. On GPUs that the fastest kernels serve
    all of it is one launch, and in the backward pass two.

    Args:
        xs: G tensors (B, T, D_g) of one dtype: float32, float64, bfloat16 or float16; any strides.
        coefficients: (B, T, G, R), floating: those of all tensors, as one matrix product makes them.
        bases: G tensors (R, W, D_g), floating; W from 1 to 8.
        static_filters: G tensors (W, D_g), floating; or None.
        residual, positions: as for [`headwise_dynamic_conv1d`], the same for all tensors.
        initial_states: G tensors (B, W - 1, D_g), floating; or None: zeros.
        rotary: `Rotary(cos, sin, head_dim, rotated)`. cos and sin: (B, T, rotary_dim) or (1, T, rotary_dim), in the
            dtype of xs, the second half repeating the first, as transformers makes them; they get no gradients.
            head_dim: channels of a head, the first rotary_dim (an even number) of them are rotated. rotated: for each
            tensor, whether it is. The result is that of transformers' `apply_rotary_pos_emb` on the convolved tensor.
        impl: "auto", "triton" or "reference". The environment variable DYNCONV_IMPL overrides "auto".

    Returns:
        G tensors y (B, T, D_g) in the dtype of xs.

    Raises:
        TypeError: an argument is not a tensor of the right kind.
        ValueError: a shape, a number of tensors, a device or `impl` does not fit; the message holds the offending
            value.
    """
    xs, bases = list(xs), list(bases)
    static_filters = None if static_filters is None else list(static_filters)
    initial_states = None if initial_states is None else list(initial_states)
    _check_group(xs, coefficients, bases, static_filters, positions, initial_states)
    if rotary is not None:
        _check_rotary(xs, rotary)
        rotary = rotary._replace(cos=rotary.cos.detach(), sin=rotary.sin.detach())
    if select_implementation(xs[0], impl).name == "triton":
        cos, sin, head_dim, rotated = rotary or (None, None, 0, [False] * len(xs))
        return ops.lowrank_group(
            xs,
            coefficients,
            bases,
            static_filters or [],
            residual,
            positions,
            initial_states or [],
            cos,
            sin,
            head_dim,
            list(rotated),
        )
    return lowrank_group_reference(
        xs,
        coefficients,
        bases,
        static_filters,
        residual=residual,
        positions_BT=positions,
        initial_states=initial_states,
        rotary=rotary,
    )


def _check_group(
    xs: list[torch.Tensor],
    coefficients: torch.Tensor,
    bases: list[torch.Tensor],
    static_filters: list[torch.Tensor] | None,
    positions: torch.Tensor | None,
    initial_states: list[torch.Tensor] | None,
) -> None:
    if not xs:
        raise ValueError("xs must have at least one tensor, got none")
    for name, tensors in {"bases": bases, "static_filters": static_filters, "initial_states": initial_states}.items():
        if tensors is not None and len(tensors) != len(xs):
            raise ValueError(f"{name} must have as many tensors as xs, {len(xs)}, got {len(tensors)}")
    for g, x in enumerate(xs):
        check_input(f"xs[{g}]", x, "(B, T, D)", 3)
        if x.dtype != xs[0].dtype:
            raise TypeError(f"xs must have one dtype, got {xs[0].dtype} and {x.dtype}")
        if x.shape[:2] != xs[0].shape[:2]:
            raise ValueError(f"xs must have the same B and T, got {tuple(xs[0].shape)} and {tuple(x.shape)}")
    check_floating("coefficients", coefficients)
    if coefficients.ndim != 4 or coefficients.shape[:3] != (*xs[0].shape[:2], len(xs)):
        raise ValueError(
            f"coefficients must have shape (B, T, G, R) with B, T, G = {(*xs[0].shape[:2], len(xs))} as in xs, "
            f"got {tuple(coefficients.shape)}"
        )
    rank = coefficients.shape[-1]
    check_rank(rank, coefficients)
    check_floating("bases[0]", bases[0])
    kernel_size = bases[0].shape[1] if bases[0].ndim == 3 else 0
    for g, (x, basis) in enumerate(zip(xs, bases, strict=True)):
        check_floating(f"bases[{g}]", basis)
        if basis.shape != (rank, kernel_size, x.shape[-1]):
            raise ValueError(
                f"bases[{g}] must have shape (R, W, D) with R = {rank} as in coefficients, D = {x.shape[-1]} as in "
                f"xs[{g}] and the same W in all bases, got {tuple(basis.shape)}"
            )
        check_kernel_size(kernel_size, f"bases[{g}]", basis)
        static_filter, state = static_filters and static_filters[g], initial_states and initial_states[g]
        check_common(x, kernel_size, static_filter, positions, state)
        check_device(
            xs[0],
            xs=x,
            coefficients=coefficients,
            bases=basis,
            static_filters=static_filter,
            positions=positions,
            initial_states=state,
        )


def _check_rotary(xs: list[torch.Tensor], rotary: Rotary) -> None:
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a Rotary, got {type(rotary).__name__}")
    cos, sin, head_dim, rotated = rotary
    (batch, tokens, _), dtype = xs[0].shape, xs[0].dtype
    if len(rotated) != len(xs):
        raise ValueError(f"rotary.rotated must have one value for each of the {len(xs)} tensors, got {rotated!r}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_floating(f"rotary.{name}", tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"rotary.{name} must have the dtype of xs, {dtype}, got {tensor.dtype}")
        if tensor.ndim != 3 or tensor.shape[0] not in (batch, 1) or tensor.shape[1] != tokens:
            raise ValueError(
                f"rotary.{name} must have shape (B, T, rotary_dim) or (1, T, rotary_dim) with B, T = "
                f"{(batch, tokens)}, got {tuple(tensor.shape)}"
            )
    if cos.shape != sin.shape or cos.shape[-1] % 2 or not 0 < cos.shape[-1] <= head_dim:
        raise ValueError(
            f"the rotary_dim of cos and sin must be the same even number from 2 to head_dim = {head_dim}, got shapes "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    for x, turns in zip(xs, rotated, strict=True):
        if turns and x.shape[-1] % head_dim:
            raise ValueError(
                f"rotary.head_dim must divide the {x.shape[-1]} channels that are rotated, got {head_dim}"
            )
    check_device(xs[0], cos=cos, sin=sin)
