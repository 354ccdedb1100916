"""What the low-rank kernels share: the filters of a tile, and the tile computed in the plain way.

The static filter takes part as one more rank, whose coefficient is 1 for every token.

Shape suffixes: I rows of a tile, J its channels, R a block of ranks.
"""

import triton
import triton.language as tl

from .tiles import load_rows, tap_counts


@triton.jit
def load_coefficients(z_ptr, stride_t, t, i_I, r_R, T, RANK: tl.constexpr, HAS_STATIC: tl.constexpr):
    row_I = t + i_I
    inside_I = (row_I >= 0) & (row_I < T)
    z_IR = tl.load(
        z_ptr + t.to(tl.int64) * stride_t + (i_I[:, None] * stride_t + r_R[None, :]),
        mask=inside_I[:, None] & (r_R < RANK)[None, :],
        other=0.0,
    )
    if HAS_STATIC:
        z_IR = tl.where(inside_I[:, None] & (r_R == RANK)[None, :], 1.0, z_IR)
    return z_IR


@triton.jit
def load_basis(u_ptr, s_ptr, r_R, d_J, keep_J, D, w, W: tl.constexpr, RANK: tl.constexpr, HAS_STATIC: tl.constexpr):
    row_R = r_R.to(tl.int64) * W + w
    u_RJ = tl.load(
        u_ptr + row_R[:, None] * D + d_J[None, :], mask=(r_R < RANK)[:, None] & keep_J[None, :], other=0.0
    ).to(tl.float32)
    if HAS_STATIC:
        s_J = tl.load(s_ptr + w * D + d_J, mask=keep_J, other=0.0).to(tl.float32)
        u_RJ = tl.where((r_R == RANK)[:, None], s_J[None, :], u_RJ)
    return u_RJ


@triton.jit
def filtered_sum(
    x_ptr,
    x_stride_t,
    z_ptr,
    z_stride_t,
    u_ptr,
    s_ptr,
    positions_ptr,
    positions_stride_t,
    state_ptr,
    t,
    i_I,
    d_J,
    keep_J,
    T,
    D,
    RANK: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BR: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(x[t]) + sum_w k[t, w] * x[t - w]; transposed, what x's gradient is: (x[t]) + sum_w k[t + w, w] * x[t + w]."""
    r_R = tl.arange(0, BR)
    if RESIDUAL:
        y_IJ = load_rows(x_ptr, x_stride_t, state_ptr, t, i_I, d_J, keep_J, T, D, W - 1, False).to(tl.float32)
    else:
        y_IJ = tl.zeros((i_I.shape[0], d_J.shape[0]), tl.float32)
    # A loop that is not unrolled: unrolled, all taps' loads come first, and registers spill.
    for w in tl.range(0, W, num_stages=1):
        filter_i_I = i_I + w if TRANSPOSED else i_I
        x_i_I = i_I + w if TRANSPOSED else i_I - w
        k_IJ = tl.zeros((i_I.shape[0], d_J.shape[0]), tl.float32)
        for r in range(0, RANK + HAS_STATIC, BR):
            z_IR = load_coefficients(z_ptr, z_stride_t, t, filter_i_I, r + r_R, T, RANK, HAS_STATIC)
            u_RJ = load_basis(u_ptr, s_ptr, r + r_R, d_J, keep_J, D, w, W, RANK, HAS_STATIC)
            k_IJ = tl.dot(z_IR.to(DOT), u_RJ.to(DOT), k_IJ, input_precision=PRECISION)
        x_IJ = load_rows(x_ptr, x_stride_t, state_ptr, t, x_i_I, d_J, keep_J, T, D, W - 1, HAS_STATE)
        counts_I = tap_counts(positions_ptr, positions_stride_t, t + filter_i_I, w, T, HAS_POSITIONS)
        # `where`, not a product with the mask: what a token must not see may be inf or nan.
        y_IJ += tl.where(counts_I[:, None], k_IJ * x_IJ.to(tl.float32), 0.0)
    return y_IJ
