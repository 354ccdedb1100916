"""Dynamic short convolutions in eager PyTorch: the specification, and the path for CPUs and unknown devices.

Every other implementation is tested against this one. It is W multiply-adds over whole tensors: no loop over
tokens, and never a tensor of all filters (B, T, W, D).

Shape suffixes: B batch, T tokens, D channels, W kernel size, R rank, H filter heads, P channels of one head.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from .rotary import Rotary, rotate

__all__ = [
    "accumulation_dtype",
    "convolve_one_token",
    "headwise_reference",
    "lowrank_group_reference",
    "lowrank_reference",
    "lowrank_token_filters",
    "static_reference",
]


def headwise_reference(
    x_BTD: torch.Tensor,
    filters_BTHW: torch.Tensor,
    *,
    static_filter_WD: torch.Tensor | None,
    residual: bool,
    positions_BT: torch.Tensor | None,
    initial_state_BSD: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y[t, d] = (x[t, d]) + sum_w (f[t, d // P, w] + s[w, d]) * x[t - w, d], for heads of P channels."""
    _, _, heads, kernel_size = filters_BTHW.shape
    dtype = accumulation_dtype(x_BTD)
    filters_BTHW = filters_BTHW.to(dtype)

    def tap(w: int) -> torch.Tensor:
        # One value serves the P channels of its head: expand is a view, no (B, T, D) copy of the filter is made.
        filter_BTH1 = filters_BTHW[..., w].unsqueeze(-1)
        if static_filter_WD is None:
            return filter_BTH1.expand(-1, -1, -1, x_BTD.shape[-1] // heads).flatten(-2)
        static_HP = static_filter_WD[w].to(dtype).unflatten(0, (heads, -1))
        return (filter_BTH1 + static_HP).flatten(-2)

    if x_BTD.shape[1] == 1:
        filters_BWD = filters_BTHW[:, 0].transpose(1, 2).repeat_interleave(x_BTD.shape[-1] // heads, dim=-1)
        filters_BWD = filters_BWD if static_filter_WD is None else filters_BWD + static_filter_WD.to(dtype)
        return _convolve_token_and_state(x_BTD, filters_BWD, residual, positions_BT, initial_state_BSD)
    return _convolve(x_BTD, tap, kernel_size, residual, positions_BT, initial_state_BSD)


def lowrank_reference(
    x_BTD: torch.Tensor,
    coefficients_BTR: torch.Tensor,
    basis_RWD: torch.Tensor,
    *,
    static_filter_WD: torch.Tensor | None,
    residual: bool,
    positions_BT: torch.Tensor | None,
    initial_state_BSD: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y[t, d] = (x[t, d]) + sum_w (sum_r z[t, r] * u[r, w, d] + s[w, d]) * x[t - w, d]."""
    kernel_size = basis_RWD.shape[1]
    dtype = accumulation_dtype(x_BTD)
    coefficients_BTR, basis_RWD = coefficients_BTR.to(dtype), basis_RWD.to(dtype)

    def tap(w: int) -> torch.Tensor:
        filter_BTD = coefficients_BTR @ basis_RWD[:, w]
        return filter_BTD if static_filter_WD is None else filter_BTD + static_filter_WD[w].to(dtype)

    # Autocast would round the product that makes the filters to half precision. Turning off what is off costs a
    # generated token as much as the convolution.
    is_autocast = torch.is_autocast_enabled(x_BTD.device.type)
    with torch.autocast(x_BTD.device.type, enabled=False) if is_autocast else nullcontext():
        if x_BTD.shape[1] == 1:
            filters_BWD = lowrank_token_filters(coefficients_BTR[:, 0], basis_RWD, static_filter_WD)
            return _convolve_token_and_state(x_BTD, filters_BWD, residual, positions_BT, initial_state_BSD)
        return _convolve(x_BTD, tap, kernel_size, residual, positions_BT, initial_state_BSD)


def lowrank_group_reference(
    xs: Sequence[torch.Tensor],
    coefficients_BTGR: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor] | None,
    *,
    residual: bool,
    positions_BT: torch.Tensor | None,
    initial_states: Sequence[torch.Tensor] | None,
    rotary: Rotary | None,
) -> list[torch.Tensor]:
    """`lowrank_reference` for each of a group, then RoPE where `rotary` says so; None or empty: not given."""
    ys = []
    for g, x_BTD in enumerate(xs):
        y_BTD, _ = lowrank_reference(
            x_BTD,
            coefficients_BTGR[:, :, g],
            bases[g],
            static_filter_WD=static_filters[g] if static_filters else None,
            residual=residual,
            positions_BT=positions_BT,
            initial_state_BSD=initial_states[g] if initial_states else None,
        )
        ys.append(rotate(y_BTD, rotary) if rotary is not None and rotary.rotated[g] else y_BTD)
    return ys


def static_reference(
    x_BTD: torch.Tensor,
    static_filter_WD: torch.Tensor,
    *,
    residual: bool,
    positions_BT: torch.Tensor | None,
    initial_state_BSD: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y[t, d] = (x[t, d]) + sum_w s[w, d] * x[t - w, d]."""
    static_filter_WD = static_filter_WD.to(accumulation_dtype(x_BTD))
    if x_BTD.shape[1] == 1:
        return _convolve_token_and_state(x_BTD, static_filter_WD[None], residual, positions_BT, initial_state_BSD)
    return _convolve(
        x_BTD,
        static_filter_WD.__getitem__,
        static_filter_WD.shape[0],
        residual,
        positions_BT,
        initial_state_BSD,
    )


def _convolve(
    x_BTD: torch.Tensor,
    tap: Callable[[int], torch.Tensor],
    kernel_size: int,
    residual: bool,
    positions_BT: torch.Tensor | None,
    initial_state_BSD: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over taps, and the final state; `tap(w)` is the filter of tap w, broadcastable to (B, T, D)."""
    tokens = x_BTD.shape[1]
    history_BLD = _with_state(x_BTD, initial_state_BSD, kernel_size)
    dtype = accumulation_dtype(x_BTD)
    y_BTD = x_BTD.to(dtype) if residual else torch.zeros_like(x_BTD, dtype=dtype)
    for w in range(kernel_size):
        start = kernel_size - 1 - w
        term_BTD = tap(w) * history_BLD[:, start : start + tokens].to(dtype)
        if positions_BT is not None:
            # `where`, not a product with the mask: what lies outside a token's sequence may be inf or nan.
            term_BTD = torch.where((positions_BT >= w).unsqueeze(-1), term_BTD, 0.0)
        y_BTD = y_BTD + term_BTD
    return y_BTD.to(x_BTD.dtype), history_BLD[:, tokens:]


def lowrank_token_filters(
    coefficients_BR: torch.Tensor, basis_RWD: torch.Tensor, static_filter_WD: torch.Tensor | None
) -> torch.Tensor:
    """(B, W, D): the filters of one token of each sequence, all taps in one product, in the dtype of the basis."""
    basis_RN = basis_RWD.flatten(1)
    if static_filter_WD is None:
        filters_BN = coefficients_BR @ basis_RN
    else:
        filters_BN = torch.addmm(static_filter_WD.to(basis_RWD.dtype).flatten(), coefficients_BR, basis_RN)
    return filters_BN.view(-1, *basis_RWD.shape[1:])


def convolve_one_token(
    history_BWD: torch.Tensor, filters_BWD: torch.Tensor, residual: bool, positions_BT: torch.Tensor | None
) -> torch.Tensor:
    """`_convolve` for T = 1, in as few calls as can be: a generated token on a CPU costs calls, not arithmetic.

    Args:
        history_BWD: the W - 1 inputs before x, oldest first, then x; in the dtype of the sum.
        filters_BWD: (B, W, D) or (1, W, D), of the same dtype.
        residual, positions_BT: as for the whole operation.
    """
    newest_first_BWD = history_BWD.flip(1)
    if positions_BT is None:
        y_BD = torch.linalg.vecdot(filters_BWD, newest_first_BWD, dim=1)
    else:
        taps_W = torch.arange(filters_BWD.shape[1], device=positions_BT.device)
        is_seen_BW1 = (positions_BT >= taps_W).unsqueeze(-1)
        y_BD = torch.where(is_seen_BW1, filters_BWD * newest_first_BWD, 0.0).sum(dim=1)
    return y_BD + newest_first_BWD[:, 0] if residual else y_BD


def _convolve_token_and_state(
    x_BTD: torch.Tensor,
    filters_BWD: torch.Tensor,
    residual: bool,
    positions_BT: torch.Tensor | None,
    initial_state_BSD: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    history_BWD = _with_state(x_BTD, initial_state_BSD, filters_BWD.shape[1])
    y_BD = convolve_one_token(history_BWD.to(filters_BWD.dtype), filters_BWD, residual, positions_BT)
    return y_BD.to(x_BTD.dtype).unsqueeze(1), history_BWD[:, 1:]


def _with_state(x_BTD: torch.Tensor, initial_state_BSD: torch.Tensor | None, kernel_size: int) -> torch.Tensor:
    """The W - 1 inputs before the first token (zeros where none are given), then x: (B, W - 1 + T, D)."""
    if initial_state_BSD is None:
        return F.pad(x_BTD, (0, 0, kernel_size - 1, 0))
    return torch.cat([initial_state_BSD.to(x_BTD.dtype), x_BTD], dim=1)


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a convolution of x is summed."""
    return torch.promote_types(x.dtype, torch.float32)
