"""The formula of the operation, term by term in float64 numpy: what the reference itself is tested against."""

import numpy as np


def convolve(x_BTD, filter_BTWD, residual, positions_BT=None, initial_state_BSD=None):
    """y[b, t, d] = (x[b, t, d]) + sum_w k[b, t, w, d] * x[b, t - w, d], one term at a time."""
    batch, tokens, _ = x_BTD.shape
    kernel_size = filter_BTWD.shape[2]
    y_BTD = x_BTD.copy() if residual else np.zeros_like(x_BTD)
    for b, t, w in np.ndindex(batch, tokens, kernel_size):
        if positions_BT is not None and positions_BT[b % len(positions_BT), t] < w:
            continue
        if t >= w:
            earlier_D = x_BTD[b, t - w]
        elif initial_state_BSD is not None:
            earlier_D = initial_state_BSD[b, kernel_size - 1 + t - w]
        else:
            continue
        y_BTD[b, t] += filter_BTWD[b, t, w] * earlier_D
    return y_BTD


def headwise_filter(filters_BTHW, channels, static_filter_WD=None):
    filter_BTWD = np.repeat(filters_BTHW, channels // filters_BTHW.shape[2], axis=2).swapaxes(2, 3)
    return filter_BTWD if static_filter_WD is None else filter_BTWD + static_filter_WD


def lowrank_filter(coefficients_BTR, basis_RWD, static_filter_WD=None):
    filter_BTWD = np.einsum("btr,rwd->btwd", coefficients_BTR, basis_RWD)
    return filter_BTWD if static_filter_WD is None else filter_BTWD + static_filter_WD
