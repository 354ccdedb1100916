"""One sequence's token in a block of channels, for the kernel in `decode`.

Shape suffixes: R a block of ranks, C channels, K elements of the hidden state.
"""

import triton
import triton.language as tl

__all__ = ["one_token"]


@triton.jit
def _coefficients(
    h_ptr,
    f_ptr,
    r_R,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    BK: tl.constexpr,
):
    """z (R,), float32. A part is what the program reads at a time; PARTS of them are on their way together."""
    k_K = tl.arange(0, BK)
    sum_RK = tl.zeros((r_R.shape[0], BK), tl.float32)
    for start in range(0, HIDDEN, PARTS * BK):
        parts = ()
        for n in tl.static_range(PARTS):
            column_K = start + n * BK + k_K
            keep_RK = (r_R < RANK)[:, None]
            if HIDDEN % (PARTS * BK) > 0:
                keep_RK = keep_RK & (column_K < HIDDEN)[None, :]
                h_K = tl.load(h_ptr + column_K, mask=column_K < HIDDEN, other=0.0)
            else:
                h_K = tl.load(h_ptr + column_K)
            f_RK = tl.load(f_ptr + (r_R[:, None] * HIDDEN + column_K[None, :]), mask=keep_RK, other=0.0)
            parts += ((f_RK, h_K),)
        for n in tl.static_range(PARTS):
            f_RK, h_K = parts[n]
            h_RK = tl.broadcast_to(h_K.to(f_RK.dtype)[None, :], f_RK.shape)
            sum_RK = tl.fma(f_RK.to(tl.float32), h_RK.to(tl.float32), sum_RK)
    return tl.sum(sum_RK, 1)


@triton.jit
def one_token(
    h_ptr,
    x_ptr,
    f_ptr,
    u_ptr,
    s_ptr,
    state_ptr,
    d_C,
    keep_C,
    position_I,
    D,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    BR: tl.constexpr,
    PARTS: tl.constexpr,
    BK: tl.constexpr,
):
    """The convolution of one sequence's token, (1, C), float32; its state is shifted.

    Tap by tap: so few numbers are loaded by the threads that need them.
    """
    keep_1C = keep_C[None, :]
    state_1C_ptr = state_ptr + d_C[None, :] * (W - 1)
    history = (tl.load(x_ptr + d_C[None, :], mask=keep_1C, other=0.0),)
    for w in tl.static_range(1, W):
        history += (tl.load(state_1C_ptr + (W - 1 - w), mask=keep_1C, other=0.0),)
    if HAS_STATIC:
        statics = ()
        for w in tl.static_range(W):
            statics += (tl.load(s_ptr + w * D + d_C, mask=keep_C, other=0.0),)
    y_1C = tl.zeros((1, d_C.shape[0]), tl.float32)
    for r in tl.range(0, RANK, BR, num_stages=1, loop_unroll_factor=1):
        r_R = r + tl.arange(0, BR)
        keep_RC = (r_R < RANK)[:, None] & keep_C[None, :]
        bases = ()
        for w in tl.static_range(W):
            bases += (tl.load(u_ptr + ((r_R * W + w) * D)[:, None] + d_C[None, :], mask=keep_RC),)
        z_R = _coefficients(h_ptr, f_ptr, r_R, RANK, HIDDEN, PARTS, BK)
        z_R = z_R.to(f_ptr.dtype.element_ty).to(tl.float32)
        # Taps before ranks: what is summed over taps waits for no coefficients.
        tapped_RC = tl.zeros((BR, d_C.shape[0]), tl.float32)
        for w in tl.static_range(W):
            history_RC = tl.broadcast_to(history[w].to(tl.float32), tapped_RC.shape)
            u_RC = tl.where(keep_RC, bases[w], 0.0)
            term_RC = tl.fma(u_RC.to(tl.float32), history_RC, tapped_RC)
            # `where`, not a product with the mask: what a token must not see may be inf or nan.
            tapped_RC = tl.where((position_I >= w)[:, None], term_RC, tapped_RC)
        y_1C += tl.sum(z_R[:, None] * tapped_RC, 0)[None, :]
    if HAS_STATIC:
        for w in tl.static_range(W):
            term_1C = tl.fma(statics[w].to(tl.float32)[None, :], history[w].to(tl.float32), y_1C)
            y_1C = tl.where((position_I >= w)[:, None], term_1C, y_1C)
    if RESIDUAL:
        y_1C += history[0].to(tl.float32)
    if W > 1:
        # Every thread has read the old state before any writes the new one.
        tl.debug_barrier()
        for w in tl.static_range(W - 1):
            tl.store(state_1C_ptr + (W - 2 - w), history[w], mask=keep_1C)
    return y_1C
