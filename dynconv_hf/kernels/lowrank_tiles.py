"""What the low-rank kernels share: loads of coefficients and basis.

The static filter takes part as one more rank, whose coefficient is 1 for every token.

Shape suffixes: I rows of a tile, J its channels, R a block of ranks.
"""

import triton
import triton.language as tl


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
