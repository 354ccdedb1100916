"""Convolutions whose filters lie in memory, backward: see `direct_tiles` for how a program goes along time."""

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
    pack_word,
    spread,
    spread_words,
    tap_filter,
    where_counts,
)

_SHAPE_ARGUMENTS = ["B", "T", "dy_stride_b", "x_stride_b", "f_stride_b", "positions_stride_b", "L"]


@triton.jit
def _zeros(count: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(count):
        tiles += (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return tiles


@triton.jit
def _advance_dx(
    dx_W,
    dy_IJ,
    words,
    s_W,
    position_I,
    W: tl.constexpr,
    dtype: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BP: tl.constexpr,
):
    """Adds what one token gives to dx of itself and of the W - 1 before it, newest first; the oldest is complete."""
    own = (dy_IJ,) if RESIDUAL else (tl.zeros_like(dy_IJ),)
    before_W = own + dx_W
    words = spread_words(words, BP)
    new_dx_W = ()
    for w in tl.static_range(W):
        dx_IJ = before_W[w]
        with_tap_IJ = tl.fma(tap_filter(words, s_W, w, W, dtype), dy_IJ, dx_IJ)
        new_dx_W += (where_counts(with_tap_IJ, dx_IJ, position_I, w, HAS_POSITIONS),)
    return new_dx_W


@triton.jit
def _load_and_advance_dx(
    dx_W,
    dy_ptr,
    words_ptr,
    positions_ptr,
    positions_stride_t,
    row_I,
    T,
    dy_offset_IJ,
    keep_J,
    f_offset_IH,
    keep_H,
    s_W,
    W: tl.constexpr,
    WORDS: tl.constexpr,
    dtype: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BP: tl.constexpr,
):
    """The same for the token at row_I, which is loaded for this alone."""
    inside_I = (row_I < T)[:, None]
    dy_IJ = tl.load(dy_ptr + dy_offset_IJ, mask=inside_I & keep_J[None, :], other=0.0).to(tl.float32)
    words = load_words(words_ptr, f_offset_IH, inside_I & keep_H[None, :], WORDS)
    position_I = load_positions(positions_ptr, row_I, positions_stride_t, T, HAS_POSITIONS)
    return _advance_dx(dx_W, dy_IJ, words, s_W, position_I, W, dtype, RESIDUAL, HAS_POSITIONS, BP)


@triton.jit
def _sum_heads(g_IJ, BH: tl.constexpr, BP: tl.constexpr, LANES: tl.constexpr):
    """Sums over the channels of a head: (I, BH * LANES), each of the LANES threads that share a head knows its sum.

    First within a thread, then over threads: that keeps the layout in which threads write.
    """
    sum_IL = tl.sum(g_IJ.reshape(g_IJ.shape[0], BH * LANES, BP // LANES), axis=2)
    if LANES > 1:
        sum_IL = spread(tl.sum(sum_IL.reshape(g_IJ.shape[0], BH, LANES), axis=2), LANES)
    return sum_IL


@triton.jit
def _store_df(
    words_ptr,
    df_W,
    inside_I,
    offset_IL,
    keep_L,
    lane_L,
    dtype: tl.constexpr,
    W: tl.constexpr,
    WORD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes the taps' sums as words; the threads that share a head write different words of it."""
    WORDS: tl.constexpr = W * dtype.primitive_bitwidth // WORD
    for first in tl.static_range(0, WORDS, LANES):
        word_IL = pack_word(df_W, first, WORD, dtype)
        for lane in tl.static_range(1, min(LANES, WORDS - first)):
            word_IL = tl.where((lane_L == lane)[None, :], pack_word(df_W, first + lane, WORD, dtype), word_IL)
        mask_IL = inside_I[:, None] & (keep_L & (first + lane_L < WORDS))[None, :]
        tl.store(words_ptr + (offset_IL + first), word_IL, mask=mask_IL)


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def direct_backward_kernel(
    dy_ptr,
    x_ptr,
    f_ptr,
    s_ptr,
    positions_ptr,
    state_ptr,
    dx_ptr,
    df_ptr,
    ds_ptr,
    dstate_ptr,
    B,
    T,
    dy_stride_b,
    dy_stride_t,
    x_stride_b,
    x_stride_t,
    f_stride_b,
    f_stride_t,
    positions_stride_b,
    positions_stride_t,
    L,
    DY_ALIGNMENT: tl.constexpr,
    DY_DENSE: tl.constexpr,
    X_ALIGNMENT: tl.constexpr,
    X_DENSE: tl.constexpr,
    F_ALIGNMENT: tl.constexpr,
    F_DENSE: tl.constexpr,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    DF_WORD: tl.constexpr,
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
    LANES: tl.constexpr,
    U: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program goes forward in time, and completes dx of a token W - 1 tokens later.

    df_ptr: (parts of a head, B, T, HEADS, W) and ds_ptr: (programs of a block, W, D), float32, are to be summed over
    their first dimension; where a head has one part, df_ptr is the gradient itself, in its own type. The other
    arguments are as in the forward.
    """
    D: tl.constexpr = HEADS * P
    STATE: tl.constexpr = W - 1
    PARTS: tl.constexpr = (P + BP - 1) // BP
    F_TYPE: tl.constexpr = f_ptr.dtype.element_ty
    DF_TYPE: tl.constexpr = df_ptr.dtype.element_ty
    DF_WORDS: tl.constexpr = W * DF_TYPE.primitive_bitwidth // DF_WORD
    if DY_DENSE:
        dy_stride_t = D
    if X_DENSE:
        x_stride_t = D
    if F_DENSE:
        f_stride_t = HEADS * WORDS
    blocks, chunks = tl.cdiv(HEADS, BH) * PARTS, tl.cdiv(T, RUNS * L)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, start = (chunk // chunks).to(tl.int64), (chunk % chunks) * (RUNS * L)
    head, d_J, keep_J = block_channels(block, HEADS, P, BH, BP)
    h_H = head + tl.arange(0, BH)
    keep_H = h_H < HEADS
    head_L, lane_L = head + tl.arange(0, BH * LANES) // LANES, tl.arange(0, BH * LANES) % LANES
    run_I = tl.arange(0, RUNS) * L
    run_wide_I = run_I.to(tl.int64)[:, None]
    dy_ptr += b * dy_stride_b * DY_ALIGNMENT + start.to(tl.int64) * dy_stride_t
    x_ptr += b * x_stride_b * X_ALIGNMENT + start.to(tl.int64) * x_stride_t
    dx_ptr += (b * T + start - STATE) * D
    words_ptr = as_words(f_ptr, WORD) + (b * f_stride_b * F_ALIGNMENT + start.to(tl.int64) * f_stride_t)
    df_token = (block % PARTS).to(tl.int64) * B * T + b * T + start
    df_words_ptr = as_words(df_ptr, DF_WORD) + df_token * (HEADS * DF_WORDS)
    positions_ptr += b * positions_stride_b
    state_ptr += b * (STATE * D)
    dstate_ptr += b * (STATE * D)
    dy_offset_IJ = run_wide_I * dy_stride_t + d_J[None, :]
    x_offset_IJ = run_wide_I * x_stride_t + d_J[None, :]
    dx_offset_IJ = run_wide_I * D + d_J[None, :]
    f_offset_IH = run_wide_I * f_stride_t + (h_H * WORDS)[None, :]
    df_offset_IL = run_wide_I * (HEADS * DF_WORDS) + (head_L * DF_WORDS + lane_L)[None, :]

    s_W = load_static(s_ptr, d_J, keep_J, D, W, HAS_STATIC, RUNS)
    x_W = load_before(x_ptr, x_offset_IJ, x_stride_t, state_ptr, start + run_I, d_J, keep_J, T, D, STATE, HAS_STATE)
    if HAS_STATE:  # noqa: SIM102 (one is known when compiling, the other is not)
        if start == 0:
            # What the first tokens give to the state.
            dstate_W = _zeros(STATE, RUNS, BH * BP)
            for u in tl.range(0, STATE, num_stages=1, loop_unroll_factor=1):
                dstate_W = _load_and_advance_dx(
                    dstate_W,
                    dy_ptr + u * dy_stride_t,
                    words_ptr + u * f_stride_t,
                    positions_ptr,
                    positions_stride_t,
                    u + run_I,
                    T,
                    dy_offset_IJ,
                    keep_J,
                    f_offset_IH,
                    keep_H,
                    s_W,
                    W,
                    WORDS,
                    F_TYPE,
                    RESIDUAL,
                    HAS_POSITIONS,
                    BP,
                )
                tl.store(
                    dstate_ptr + u * D + dx_offset_IJ,
                    dstate_W[STATE].to(dstate_ptr.dtype.element_ty),
                    mask=(run_I == 0)[:, None] & keep_J[None, :],
                )
                dstate_W = dstate_W[:STATE]
    dx_W = _zeros(STATE, RUNS, BH * BP)
    ds_W = _zeros(W if HAS_STATIC else 0, RUNS, BH * BP)
    for i in tl.range(0, L, U, num_stages=STAGES):
        # All of a step's loads come first: the compiler does not move them past the stores.
        dy_U = ()
        x_U = ()
        words_U = ()
        position_U = ()
        for u in tl.static_range(U):
            row_I = start + i + u + run_I
            inside_I = (row_I < T)[:, None]
            dy_U += (tl.load(dy_ptr + u * dy_stride_t + dy_offset_IJ, mask=inside_I & keep_J[None, :], other=0.0),)
            x_U += (tl.load(x_ptr + u * x_stride_t + x_offset_IJ, mask=inside_I & keep_J[None, :], other=0.0),)
            words_U += (load_words(words_ptr + u * f_stride_t, f_offset_IH, inside_I & keep_H[None, :], WORDS),)
            position_U += (load_positions(positions_ptr, row_I, positions_stride_t, T, HAS_POSITIONS),)
        for u in tl.static_range(U):
            row_I = start + i + u + run_I
            dy_IJ = dy_U[u].to(tl.float32)
            dx_W = _advance_dx(dx_W, dy_IJ, words_U[u], s_W, position_U[u], W, F_TYPE, RESIDUAL, HAS_POSITIONS, BP)
            # The tokens before a run are complete in another run, or are the state's.
            of_run_I = (row_I >= start + run_I + STATE) & (row_I < T + STATE)
            tl.store(
                dx_ptr + u * D + dx_offset_IJ,
                dx_W[STATE].to(dx_ptr.dtype.element_ty),
                mask=of_run_I[:, None] & keep_J[None, :],
            )
            dx_W = dx_W[:STATE]
            newest = (x_U[u].to(tl.float32),)
            x_W = newest + x_W
            df_W = ()
            new_ds_W = ()
            for w in tl.static_range(W):
                if WORDS > 0:
                    df_IL = _sum_heads(dy_IJ * x_W[w], BH, BP, LANES)
                    df_W += (where_counts(df_IL, 0.0, position_U[u], w, HAS_POSITIONS),)
                if HAS_STATIC:
                    with_tap_IJ = tl.fma(dy_IJ, x_W[w], ds_W[w])
                    new_ds_W += (where_counts(with_tap_IJ, ds_W[w], position_U[u], w, HAS_POSITIONS),)
            ds_W = new_ds_W
            x_W = x_W[:STATE]
            if WORDS > 0:
                u_ptr = df_words_ptr + u * (HEADS * DF_WORDS)
                _store_df(u_ptr, df_W, row_I < T, df_offset_IL, head_L < HEADS, lane_L, DF_TYPE, W, DF_WORD, LANES)
        x_W = carry(x_W, U)
        dy_ptr += U * dy_stride_t
        x_ptr += U * x_stride_t
        dx_ptr += U * D
        words_ptr += U * f_stride_t
        df_words_ptr += U * (HEADS * DF_WORDS)
    # What the tokens after each run give to the last of it. Not unrolled here: how long Triton takes grows with the
    # square of a kernel's length, and the machine code is the same in the end.
    for u in tl.range(0, STATE, num_stages=1, loop_unroll_factor=1):
        row_I = start + L + u + run_I
        dx_W = _load_and_advance_dx(
            dx_W,
            dy_ptr + u * dy_stride_t,
            words_ptr + u * f_stride_t,
            positions_ptr,
            positions_stride_t,
            row_I,
            T,
            dy_offset_IJ,
            keep_J,
            f_offset_IH,
            keep_H,
            s_W,
            W,
            WORDS,
            F_TYPE,
            RESIDUAL,
            HAS_POSITIONS,
            BP,
        )
        tl.store(
            dx_ptr + u * D + dx_offset_IJ,
            dx_W[STATE].to(dx_ptr.dtype.element_ty),
            mask=(row_I < T + STATE)[:, None] & keep_J[None, :],
        )
        dx_W = dx_W[:STATE]
    if HAS_STATIC:
        # L % U is zero, but the compiler does not know: it finds the chunk anew, and keeps no register for it.
        ds_ptr += (((tl.program_id(0) + L % U) // blocks).to(tl.int64) * W) * D
        for w in tl.static_range(W):
            tl.store(ds_ptr + w * D + d_J, tl.sum(ds_W[w], axis=0), mask=keep_J)
