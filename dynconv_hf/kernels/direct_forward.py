"""Convolutions whose filters lie in memory, forward: see `direct_tiles` for how a program goes along time."""

import triton
import triton.language as tl

from .direct_tiles import (
    as_words,
    block_channels,
    carry,
    load_before,
    load_positions,
    load_static,
    load_words,
    spread_words,
    tap_filter,
    where_counts,
)

_SHAPE_ARGUMENTS = ["T", "x_stride_b", "f_stride_b", "positions_stride_b", "L"]


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def direct_forward_kernel(
    x_ptr,
    f_ptr,
    s_ptr,
    positions_ptr,
    state_ptr,
    y_ptr,
    T,
    x_stride_b,
    x_stride_t,
    f_stride_b,
    f_stride_t,
    positions_stride_b,
    positions_stride_t,
    L,
    X_ALIGNMENT: tl.constexpr,
    X_DENSE: tl.constexpr,
    F_ALIGNMENT: tl.constexpr,
    F_DENSE: tl.constexpr,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    RUNS: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
    U: tl.constexpr,
    STAGES: tl.constexpr,
):
    """f_stride_b, f_stride_t count words; WORDS: those of one head, 0 without head-wise filters. DENSE: no gaps."""
    D: tl.constexpr = HEADS * P
    if X_DENSE:
        x_stride_t = D
    if F_DENSE:
        f_stride_t = HEADS * WORDS
    blocks, chunks = tl.cdiv(HEADS, BH) * tl.cdiv(P, BP), tl.cdiv(T, RUNS * L)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, start = (chunk // chunks).to(tl.int64), (chunk % chunks) * (RUNS * L)
    head, d_J, keep_J = block_channels(block, HEADS, P, BH, BP)
    h_H = head + tl.arange(0, BH)
    keep_H = h_H < HEADS
    run_I = tl.arange(0, RUNS) * L
    run_wide_I = run_I.to(tl.int64)[:, None]
    x_ptr += b * x_stride_b * X_ALIGNMENT + start.to(tl.int64) * x_stride_t
    y_ptr += (b * T + start) * D
    words_ptr = as_words(f_ptr, WORD) + (b * f_stride_b * F_ALIGNMENT + start.to(tl.int64) * f_stride_t)
    positions_ptr += b * positions_stride_b
    state_ptr += b * ((W - 1) * D)
    x_offset_IJ = run_wide_I * x_stride_t + d_J[None, :]
    y_offset_IJ = run_wide_I * D + d_J[None, :]
    f_offset_IH = run_wide_I * f_stride_t + (h_H * WORDS)[None, :]

    s_W = load_static(s_ptr, d_J, keep_J, D, W, HAS_STATIC, RUNS)
    x_W = load_before(x_ptr, x_offset_IJ, x_stride_t, state_ptr, start + run_I, d_J, keep_J, T, D, W - 1, HAS_STATE)
    for i in tl.range(0, L, U, num_stages=STAGES):
        # All of a step's loads come first: the compiler does not move them past the stores.
        x_U = ()
        words_U = ()
        position_U = ()
        for u in tl.static_range(U):
            row_I = start + i + u + run_I
            inside_I = (row_I < T)[:, None]
            x_U += (tl.load(x_ptr + u * x_stride_t + x_offset_IJ, mask=inside_I & keep_J[None, :], other=0.0),)
            words_U += (load_words(words_ptr + u * f_stride_t, f_offset_IH, inside_I & keep_H[None, :], WORDS),)
            position_U += (load_positions(positions_ptr, row_I, positions_stride_t, T, HAS_POSITIONS),)
        for u in tl.static_range(U):
            newest = (x_U[u].to(tl.float32),)
            x_W = newest + x_W
            words = spread_words(words_U[u], BP)
            y_IJ = x_W[0] if RESIDUAL else tl.zeros((RUNS, BH * BP), tl.float32)
            for w in tl.static_range(W):
                k_IJ = tap_filter(words, s_W, w, W, f_ptr.dtype.element_ty)
                with_tap_IJ = tl.fma(k_IJ, x_W[w], y_IJ)
                y_IJ = where_counts(with_tap_IJ, y_IJ, position_U[u], w, HAS_POSITIONS)
            x_W = x_W[: W - 1]
            inside_I = (start + i + u + run_I < T)[:, None]
            tl.store(y_ptr + u * D + y_offset_IJ, y_IJ.to(y_ptr.dtype.element_ty), mask=inside_I & keep_J[None, :])
        x_W = carry(x_W, U)
        x_ptr += U * x_stride_t
        y_ptr += U * D
        words_ptr += U * f_stride_t
