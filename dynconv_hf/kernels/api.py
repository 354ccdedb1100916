"""The public operation: what it means, what it accepts, and which implementation runs.

Shapes: B batch, T tokens, D channels, W kernel size (1 to 8), R rank, H filter heads (H divides D):

    y[b, t, d] = (x[b, t, d] if residual) + sum_{w=0}^{W-1} k[b, t, d, w] * x[b, t - w, d]

Tap w multiplies the token w steps back. The filter k is

    static     k = s[w, d]
    headwise   k = f[b, t, d // (D / H), w]             (+ s[w, d])
    lowrank    k = sum_r z[b, t, r] * u[r, w, d]        (+ s[w, d])

Sums accumulate in float32 (float64 for float64 inputs), whatever the dtypes of the arguments; y has x's dtype.

Source: Sieberling, Runwal, Panda, Kim, "Dynamic Short Convolutions Improve Transformers", arXiv 2606.03825;
the static relative: Canon layers, Allen-Zhu 2025.
"""

from typing import overload

import torch
import torch.nn.functional as F

from . import ops
from .dispatch import Implementation, select_implementation
from .reference import headwise_reference, lowrank_reference, static_reference
from .validation import (
    MAX_KERNEL_SIZE,
    check_common,
    check_device,
    check_floating,
    check_heads,
    check_input,
    check_kernel_size,
    check_rank,
    check_state,
    check_tensor,
)

__all__ = [
    "MAX_KERNEL_SIZE",
    "headwise_dynamic_conv1d",
    "headwise_dynamic_conv1d_update",
    "lowrank_dynamic_conv1d",
    "lowrank_dynamic_conv1d_update",
    "static_conv1d",
    "static_conv1d_update",
]

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def headwise_dynamic_conv1d(
    x: torch.Tensor,
    filters: torch.Tensor,
    *,
    static_filter: torch.Tensor | None = None,
    residual: bool = True,
    positions: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = False,
    impl: Implementation = "auto",
) -> Output:
    """Causal short convolution with a filter for each token and each head of D / H neighbouring channels.

    Args:
        x: (B, T, D), float32, float64, bfloat16 or float16; any strides.
        filters: (B, T, H, W), floating; H divides D, W from 1 to 8.
        static_filter: (W, D), floating; a filter shared by all tokens, added to `filters`.
        residual: add x to the output.
        positions: (B, T) or (1, T), integer; the index of each token within its own sequence. Tap w counts only
            where `positions >= w`. None: nothing is cut off.
        initial_state: (B, W - 1, D), floating; the inputs just before the first token, oldest first. None: zeros.
        return_final_state: also return the state for the next call, (B, W - 1, D) in x's dtype.
        impl: "auto", "triton" or "reference". The environment variable DYNCONV_IMPL overrides "auto".

    Returns:
        y (B, T, D) in x's dtype, or (y, final_state) with `return_final_state=True`.

    Raises:
        TypeError: an argument is not a tensor of the right kind.
        ValueError: a shape, a device or `impl` does not fit; the message holds the offending value.
    """
    check_input("x", x, "(B, T, D)", 3)
    check_floating("filters", filters)
    if filters.ndim != 4 or filters.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"filters must have shape (B, T, H, W) with B, T = {tuple(x.shape[:2])} as in x, "
            f"got {tuple(filters.shape)}"
        )
    heads, kernel_size = filters.shape[2:]
    check_kernel_size(kernel_size, "filters", filters)
    check_heads(heads, x.shape[-1])
    check_common(x, kernel_size, static_filter, positions, initial_state)
    check_device(x, filters=filters, static_filter=static_filter, positions=positions, initial_state=initial_state)
    if select_implementation(x, impl).name == "triton":
        y = ops.headwise(x, filters, static_filter, residual, positions, initial_state)
        return (y, _final_state(x, initial_state, kernel_size)) if return_final_state else y
    y, final_state = headwise_reference(
        x,
        filters,
        static_filter_WD=static_filter,
        residual=residual,
        positions_BT=positions,
        initial_state_BSD=initial_state,
    )
    # A copy: the state outlives the call, and must not keep all of its inputs in memory.
    return (y, final_state.clone()) if return_final_state else y


def lowrank_dynamic_conv1d(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    *,
    static_filter: torch.Tensor | None = None,
    residual: bool = True,
    positions: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = False,
    impl: Implementation = "auto",
) -> Output:
    """Causal short convolution whose filters are combinations, chosen by each token, of R learned filters.

    Args:
        x: (B, T, D), float32, float64, bfloat16 or float16; any strides.
        coefficients: (B, T, R), floating; R >= 1.
        basis: (R, W, D), floating; W from 1 to 8.
        static_filter, residual, positions, initial_state, return_final_state, impl: as for
            [`headwise_dynamic_conv1d`].

    Returns:
        y (B, T, D) in x's dtype, or (y, final_state) with `return_final_state=True`.

    Raises:
        TypeError: an argument is not a tensor of the right kind.
        ValueError: a shape, a device or `impl` does not fit; the message holds the offending value.
    """
    check_input("x", x, "(B, T, D)", 3)
    check_floating("coefficients", coefficients)
    check_floating("basis", basis)
    if coefficients.ndim != 3 or coefficients.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"coefficients must have shape (B, T, R) with B, T = {tuple(x.shape[:2])} as in x, "
            f"got {tuple(coefficients.shape)}"
        )
    rank, channels = coefficients.shape[-1], x.shape[-1]
    check_rank(rank, coefficients)
    if basis.ndim != 3 or basis.shape[0] != rank or basis.shape[2] != channels:
        raise ValueError(
            f"basis must have shape (R, W, D) with R = {rank} as in coefficients and D = {channels} as in x, "
            f"got {tuple(basis.shape)}"
        )
    kernel_size = basis.shape[1]
    check_kernel_size(kernel_size, "basis", basis)
    check_common(x, kernel_size, static_filter, positions, initial_state)
    check_device(
        x,
        coefficients=coefficients,
        basis=basis,
        static_filter=static_filter,
        positions=positions,
        initial_state=initial_state,
    )
    if select_implementation(x, impl).name == "triton":
        y = ops.lowrank(x, coefficients, basis, static_filter, residual, positions, initial_state)
        return (y, _final_state(x, initial_state, kernel_size)) if return_final_state else y
    y, final_state = lowrank_reference(
        x,
        coefficients,
        basis,
        static_filter_WD=static_filter,
        residual=residual,
        positions_BT=positions,
        initial_state_BSD=initial_state,
    )
    # A copy: the state outlives the call, and must not keep all of its inputs in memory.
    return (y, final_state.clone()) if return_final_state else y


def static_conv1d(
    x: torch.Tensor,
    static_filter: torch.Tensor,
    *,
    residual: bool = True,
    positions: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = False,
    impl: Implementation = "auto",
) -> Output:
    """Causal short convolution with one filter per channel, the same for all tokens (a Canon layer).

    Args:
        x: (B, T, D), float32, float64, bfloat16 or float16; any strides.
        static_filter: (W, D), floating; W from 1 to 8.
        residual, positions, initial_state, return_final_state, impl: as for [`headwise_dynamic_conv1d`].

    Returns:
        y (B, T, D) in x's dtype, or (y, final_state) with `return_final_state=True`.

    Raises:
        TypeError: an argument is not a tensor of the right kind.
        ValueError: a shape, a device or `impl` does not fit; the message holds the offending value.
    """
    check_input("x", x, "(B, T, D)", 3)
    check_floating("static_filter", static_filter)
    if static_filter.ndim != 2:
        raise ValueError(f"static_filter must have shape (W, D), got {tuple(static_filter.shape)}")
    kernel_size = static_filter.shape[0]
    check_kernel_size(kernel_size, "static_filter", static_filter)
    check_common(x, kernel_size, static_filter, positions, initial_state)
    check_device(x, static_filter=static_filter, positions=positions, initial_state=initial_state)
    if select_implementation(x, impl).name == "triton":
        y = ops.static(x, static_filter, residual, positions, initial_state)
        return (y, _final_state(x, initial_state, kernel_size)) if return_final_state else y
    y, final_state = static_reference(
        x, static_filter, residual=residual, positions_BT=positions, initial_state_BSD=initial_state
    )
    # A copy: the state outlives the call, and must not keep all of its inputs in memory.
    return (y, final_state.clone()) if return_final_state else y


@torch.no_grad()
def headwise_dynamic_conv1d_update(
    x: torch.Tensor,
    filters: torch.Tensor,
    state: torch.Tensor,
    *,
    static_filter: torch.Tensor | None = None,
    residual: bool = True,
    positions: torch.Tensor | None = None,
    impl: Implementation = "auto",
) -> torch.Tensor:
    """One token of [`headwise_dynamic_conv1d`], for decoding; no gradients.

    Args:
        x: (B, D).
        filters: (B, H, W).
        state: (B, W - 1, D), the inputs just before x, oldest first; updated in place.
        static_filter, residual, impl: as for [`headwise_dynamic_conv1d`].
        positions: (B,) or (1,), integer.

    Returns:
        y (B, D) in x's dtype.
    """
    check_input("x", x, "(B, D)", 2)
    check_state(state)
    y, final_state = headwise_dynamic_conv1d(
        x.unsqueeze(1),
        _one_token("filters", filters),
        static_filter=static_filter,
        residual=residual,
        positions=_one_token("positions", positions),
        initial_state=state,
        return_final_state=True,
        impl=impl,
    )
    state.copy_(final_state)
    return y.squeeze(1)


@torch.no_grad()
def lowrank_dynamic_conv1d_update(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    state: torch.Tensor,
    *,
    static_filter: torch.Tensor | None = None,
    residual: bool = True,
    positions: torch.Tensor | None = None,
    impl: Implementation = "auto",
) -> torch.Tensor:
    """One token of [`lowrank_dynamic_conv1d`], for decoding; no gradients.

    Args:
        x: (B, D).
        coefficients: (B, R).
        basis: (R, W, D).
        state: (B, W - 1, D), the inputs just before x, oldest first; updated in place.
        static_filter, residual, impl: as for [`lowrank_dynamic_conv1d`].
        positions: (B,) or (1,), integer.

    Returns:
        y (B, D) in x's dtype.
    """
    check_input("x", x, "(B, D)", 2)
    check_state(state)
    y, final_state = lowrank_dynamic_conv1d(
        x.unsqueeze(1),
        _one_token("coefficients", coefficients),
        basis,
        static_filter=static_filter,
        residual=residual,
        positions=_one_token("positions", positions),
        initial_state=state,
        return_final_state=True,
        impl=impl,
    )
    state.copy_(final_state)
    return y.squeeze(1)


@torch.no_grad()
def static_conv1d_update(
    x: torch.Tensor,
    static_filter: torch.Tensor,
    state: torch.Tensor,
    *,
    residual: bool = True,
    positions: torch.Tensor | None = None,
    impl: Implementation = "auto",
) -> torch.Tensor:
    """One token of [`static_conv1d`], for decoding; no gradients.

    Args:
        x: (B, D).
        static_filter: (W, D).
        state: (B, W - 1, D), the inputs just before x, oldest first; updated in place.
        residual, impl: as for [`static_conv1d`].
        positions: (B,) or (1,), integer.

    Returns:
        y (B, D) in x's dtype.
    """
    check_input("x", x, "(B, D)", 2)
    check_state(state)
    y, final_state = static_conv1d(
        x.unsqueeze(1),
        static_filter,
        residual=residual,
        positions=_one_token("positions", positions),
        initial_state=state,
        return_final_state=True,
        impl=impl,
    )
    state.copy_(final_state)
    return y.squeeze(1)


def _final_state(x: torch.Tensor, initial_state: torch.Tensor | None, kernel_size: int) -> torch.Tensor:
    """The last W - 1 inputs, the state's included where x is shorter: (B, W - 1, D) in x's dtype; a copy."""
    missing = kernel_size - 1 - x.shape[1]
    if missing <= 0:
        return x[:, -missing:].clone()
    if initial_state is None:
        return F.pad(x, (0, 0, missing, 0))
    return torch.cat([initial_state[:, -missing:].to(x.dtype), x], dim=1)


@overload
def _one_token(name: str, tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def _one_token(name: str, tensor: None) -> None: ...
def _one_token(name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Gives a tensor of one token the token dimension, (B, ...) to (B, 1, ...)."""
    if tensor is None:
        return None
    check_tensor(name, tensor)
    if tensor.ndim == 0:
        raise ValueError(f"{name} must have a batch dimension, got a scalar")
    return tensor.unsqueeze(1)
