"""Convolutions whose filters lie in memory, in Triton: head-wise filters, a static filter, or their sum.

A block of channels is BH heads by BP channels of each: several whole heads, or a part of one large head.

Shape suffixes: I rows of a tile, J its channels, H its heads, K heads times taps, W taps (a tuple).
"""

import torch
import triton
import triton.language as tl

from .launch import flat_rows, multiprocessors, on_device, rows, state_rows
from .reduction import sum_partials
from .tiles import load_rows, store_rows, tap_counts

__all__ = ["backward", "forward"]

_SHAPE_ARGUMENTS = ["B", "T", "x_stride_b", "f_stride_b", "dy_stride_b", "positions_stride_b", "tiles_per_chunk"]


@triton.jit
def _channels(block, HEADS: tl.constexpr, P: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr):
    """The first head of a block and its channels d_J, with what of them exists."""
    PARTS: tl.constexpr = (P + BP - 1) // BP
    head, p = (block // PARTS) * BH, (block % PARTS) * BP
    j_J = tl.arange(0, BH * BP)
    if BH == 1:
        d_J = head * P + p + j_J
        keep_J = p + j_J < P
    elif P == BP:
        d_J = head * P + j_J
        keep_J = d_J < HEADS * P
    else:
        head_J, p_J = head + j_J // BP, j_J % BP
        d_J = head_J * P + p_J
        keep_J = (head_J < HEADS) & (p_J < P)
    return head, d_J, keep_J


@triton.jit
def _load_taps(f_ptr, stride_t, t, i_I, head, T, w, W: tl.constexpr, HEADS: tl.constexpr, BH: tl.constexpr):
    """Tap w of rows t + i_I for BH heads, (I, H)."""
    row_I = t + i_I
    h_H = head + tl.arange(0, BH)
    return tl.load(
        f_ptr + t.to(tl.int64) * stride_t + (i_I[:, None] * stride_t + (h_H * W + w)[None, :]),
        mask=((row_I >= 0) & (row_I < T))[:, None] & (h_H < HEADS)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _spread(f_IH, BP: tl.constexpr):
    """One value for each head becomes one for each of its channels."""
    if BP == 1:
        return f_IH
    return tl.broadcast_to(f_IH[:, :, None], [f_IH.shape[0], f_IH.shape[1], BP]).reshape(
        f_IH.shape[0], f_IH.shape[1] * BP
    )


@triton.jit
def _filtered_sum(
    x_ptr,
    x_stride_t,
    f_ptr,
    f_stride_t,
    s_ptr,
    positions_ptr,
    positions_stride_t,
    state_ptr,
    t,
    i_I,
    head,
    d_J,
    keep_J,
    T,
    D,
    HEADS: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_FILTERS: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
):
    """(x[t]) + sum_w k[t, w] * x[t - w]; transposed, what x's gradient is: (x[t]) + sum_w k[t + w, w] * x[t + w]."""
    if RESIDUAL:
        y_IJ = load_rows(x_ptr, x_stride_t, state_ptr, t, i_I, d_J, keep_J, T, D, W - 1, False).to(tl.float32)
    else:
        y_IJ = tl.zeros((i_I.shape[0], d_J.shape[0]), tl.float32)
    for w in tl.static_range(W):
        filter_i_I = i_I + w if TRANSPOSED else i_I
        x_i_I = i_I + w if TRANSPOSED else i_I - w
        x_IJ = load_rows(x_ptr, x_stride_t, state_ptr, t, x_i_I, d_J, keep_J, T, D, W - 1, HAS_STATE).to(tl.float32)
        if HAS_FILTERS:
            k_IJ = _spread(_load_taps(f_ptr, f_stride_t, t, filter_i_I, head, T, w, W, HEADS, BH), BP)
            if HAS_STATIC:
                k_IJ += tl.load(s_ptr + w * D + d_J, mask=keep_J, other=0.0).to(tl.float32)[None, :]
            term_IJ = k_IJ * x_IJ
        else:
            term_IJ = tl.load(s_ptr + w * D + d_J, mask=keep_J, other=0.0).to(tl.float32)[None, :] * x_IJ
        counts_I = tap_counts(positions_ptr, positions_stride_t, t + filter_i_I, w, T, HAS_POSITIONS)
        # `where`, not a product with the mask: what a token must not see may be inf or nan.
        y_IJ += tl.where(counts_I[:, None], term_IJ, 0.0)
    return y_IJ


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def _forward_kernel(
    x_ptr,
    f_ptr,
    s_ptr,
    positions_ptr,
    state_ptr,
    y_ptr,
    T,
    D,
    x_stride_b,
    x_stride_t,
    f_stride_b,
    f_stride_t,
    positions_stride_b,
    positions_stride_t,
    X_ALIGNMENT: tl.constexpr,
    F_ALIGNMENT: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_FILTERS: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
):
    blocks, tiles = tl.cdiv(HEADS, BH) * tl.cdiv(P, BP), tl.cdiv(T, BT)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, t = (tile // tiles).to(tl.int64), (tile % tiles) * BT
    head, d_J, keep_J = _channels(block, HEADS, P, BH, BP)
    i_I = tl.arange(0, BT)
    y_IJ = _filtered_sum(
        x_ptr + b * x_stride_b * X_ALIGNMENT,
        x_stride_t,
        f_ptr + b * f_stride_b * F_ALIGNMENT,
        f_stride_t,
        s_ptr,
        positions_ptr + b * positions_stride_b,
        positions_stride_t,
        state_ptr + b * (W - 1) * D,
        t,
        i_I,
        head,
        d_J,
        keep_J,
        T,
        D,
        HEADS,
        W,
        RESIDUAL,
        HAS_FILTERS,
        HAS_STATIC,
        HAS_POSITIONS,
        HAS_STATE,
        False,
        BH,
        BP,
    )
    store_rows(y_ptr + b * T * D, state_ptr, y_IJ, t, i_I, d_J, keep_J, T, D, W - 1, False)


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def _backward_kernel(
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
    D,
    dy_stride_b,
    dy_stride_t,
    x_stride_b,
    x_stride_t,
    f_stride_b,
    f_stride_t,
    positions_stride_b,
    positions_stride_t,
    tiles_per_chunk,
    DY_ALIGNMENT: tl.constexpr,
    X_ALIGNMENT: tl.constexpr,
    F_ALIGNMENT: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_FILTERS: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
):
    """A chunk of tiles by a block of channels.

    df_ptr: (parts of a head, B, T, HEADS, W) and ds_ptr: (chunks, W, D), float32, are to be summed over their first
    dimension; where a head has one part, df_ptr is the gradient itself, in its own type.
    """
    STATE: tl.constexpr = W - 1
    PARTS: tl.constexpr = (P + BP - 1) // BP
    # Rows start before 0 where the state wants a gradient.
    START: tl.constexpr = -STATE if HAS_STATE else 0
    blocks, tiles = tl.cdiv(HEADS, BH) * PARTS, tl.cdiv(T - START, BT)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, d_J, keep_J = _channels(block, HEADS, P, BH, BP)
    i_I, h_H = tl.arange(0, BT), head + tl.arange(0, BH)
    df_ptr += ((block % PARTS).to(tl.int64) * B * T) * (HEADS * W)

    ds_W = ()
    for _ in tl.static_range(W):
        ds_W += (tl.zeros((BT, BH * BP), tl.float32),)
    for tile in range(chunk * tiles_per_chunk, min((chunk + 1) * tiles_per_chunk, B * tiles)):
        b, t = (tile // tiles).to(tl.int64), START + (tile % tiles) * BT
        dy_b_ptr = dy_ptr + b * dy_stride_b * DY_ALIGNMENT
        x_b_ptr = x_ptr + b * x_stride_b * X_ALIGNMENT
        positions_b_ptr = positions_ptr + b * positions_stride_b
        dx_IJ = _filtered_sum(
            dy_b_ptr,
            dy_stride_t,
            f_ptr + b * f_stride_b * F_ALIGNMENT,
            f_stride_t,
            s_ptr,
            positions_b_ptr,
            positions_stride_t,
            state_ptr,
            t,
            i_I,
            head,
            d_J,
            keep_J,
            T,
            D,
            HEADS,
            W,
            RESIDUAL,
            HAS_FILTERS,
            HAS_STATIC,
            HAS_POSITIONS,
            False,
            True,
            BH,
            BP,
        )
        store_rows(dx_ptr + b * T * D, dstate_ptr + b * STATE * D, dx_IJ, t, i_I, d_J, keep_J, T, D, STATE, HAS_STATE)
        dy_IJ = load_rows(dy_b_ptr, dy_stride_t, state_ptr, t, i_I, d_J, keep_J, T, D, STATE, False).to(tl.float32)
        row_I = t + i_I
        df_offset_I = (b * T + row_I) * (HEADS * W)
        df_mask_IH = ((row_I >= 0) & (row_I < T))[:, None] & (h_H < HEADS)[None, :]
        df_W = ()
        new_ds_W = ()
        for w in tl.static_range(W):
            x_IJ = load_rows(
                x_b_ptr, x_stride_t, state_ptr + b * STATE * D, t, i_I - w, d_J, keep_J, T, D, STATE, HAS_STATE
            )
            counts_I = tap_counts(positions_b_ptr, positions_stride_t, row_I, w, T, HAS_POSITIONS)
            g_IJ = tl.where(counts_I[:, None], dy_IJ * x_IJ.to(tl.float32), 0.0)
            if HAS_FILTERS:
                df_W += (tl.sum(g_IJ.reshape(BT, BH, BP), axis=2),)
            if HAS_STATIC:
                new_ds_W += (ds_W[w] + g_IJ,)
        if HAS_STATIC:
            ds_W = new_ds_W
        if HAS_FILTERS:
            df_tile_ptr = df_ptr + df_offset_I[:, None]
            if W == 4:
                # The taps of a head side by side: one wide store instead of four scattered ones.
                df_IK = tl.join(tl.join(df_W[0], df_W[2]), tl.join(df_W[1], df_W[3])).reshape(BT, BH * W)
                k_K = tl.arange(0, BH * W)
                mask_IK = ((row_I >= 0) & (row_I < T))[:, None] & (head * W + k_K < HEADS * W)[None, :]
                tl.store(df_tile_ptr + (head * W + k_K)[None, :], df_IK.to(df_ptr.dtype.element_ty), mask=mask_IK)
            else:
                for w in tl.static_range(W):
                    df_IH = df_W[w].to(df_ptr.dtype.element_ty)
                    tl.store(df_tile_ptr + (h_H * W + w)[None, :], df_IH, mask=df_mask_IH)
    if HAS_STATIC:
        ds_ptr += (chunk.to(tl.int64) * W) * D
        for w in tl.static_range(W):
            tl.store(ds_ptr + w * D + d_J, tl.sum(ds_W[w], axis=0), mask=keep_J)


def _block_sizes(head_size: int, channels: int, tokens: int, width: int) -> dict[str, int]:
    """Whole heads, their size rounded up to a power of two, or a part of one large head."""
    width = min(width, triton.next_power_of_2(channels))
    part = min(width, triton.next_power_of_2(head_size))
    return {"BT": tokens, "BH": width // part, "BP": part}


def _forward_sizes(head_size: int, channels: int, kernel_size: int, has_filters: bool) -> dict[str, int]:
    """What was fastest on an H100 for W = 4; for larger W, what registers hold without spilling."""
    if not has_filters:
        return {**_block_sizes(head_size, channels, 32, 128 if kernel_size <= 4 else 64), "num_warps": 8}
    return {**_block_sizes(head_size, channels, 8, 256 if kernel_size <= 4 else 128), "num_warps": 4}


def _backward_sizes(head_size: int, channels: int, kernel_size: int) -> dict[str, int]:
    return {**_block_sizes(head_size, channels, 16, 128 if kernel_size <= 4 else 64), "num_warps": 8}


def forward(
    x: torch.Tensor,
    filters: torch.Tensor | None,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> torch.Tensor:
    """y (B, T, D), contiguous, in x's dtype; see `api` for the arguments. At least one filter is given."""
    batch, tokens, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    heads, kernel_size = _heads_and_kernel_size(filters, static_filter)
    head_size = channels // heads
    x_rows, f_rows, position_rows = rows(x), rows(x if filters is None else filters), flat_rows(positions, x)
    sizes = _forward_sizes(head_size, channels, kernel_size, filters is not None)
    with on_device(x):
        _forward_kernel[(_blocks(heads, head_size, sizes) * triton.cdiv(tokens, sizes["BT"]) * batch,)](
            x_rows.tensor,
            f_rows.tensor,
            x if static_filter is None else static_filter.contiguous(),
            position_rows.tensor,
            state_rows(initial_state, x),
            y,
            tokens,
            channels,
            x_rows.stride_b,
            x_rows.stride_t,
            f_rows.stride_b,
            f_rows.stride_t,
            position_rows.stride_b,
            position_rows.stride_t,
            X_ALIGNMENT=x_rows.alignment,
            F_ALIGNMENT=f_rows.alignment,
            HEADS=heads,
            P=head_size,
            W=kernel_size,
            RESIDUAL=residual,
            HAS_FILTERS=filters is not None,
            HAS_STATIC=static_filter is not None,
            HAS_POSITIONS=positions is not None,
            HAS_STATE=initial_state is not None and kernel_size > 1,
            **sizes,
        )
    return y


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    filters: torch.Tensor | None,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x, filters, static filter and initial state, each contiguous, in its dtype."""
    gradients = tuple(
        None if a is None else torch.empty(a.shape, dtype=a.dtype, device=a.device)
        for a in (x, filters, static_filter, initial_state)
    )
    dx, dfilters, dstatic, dstate = gradients
    if x.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return gradients
    batch, tokens, channels = x.shape
    heads, kernel_size = _heads_and_kernel_size(filters, static_filter)
    head_size = channels // heads
    dy_rows, x_rows, position_rows = rows(dy), rows(x), flat_rows(positions, x)
    f_rows = rows(x if filters is None else filters)
    has_state = initial_state is not None and kernel_size > 1
    sizes = _backward_sizes(head_size, channels, kernel_size)
    blocks, parts = _blocks(heads, head_size, sizes), triton.cdiv(head_size, sizes["BP"])
    tiles = batch * triton.cdiv(tokens + (kernel_size - 1 if has_state else 0), sizes["BT"])
    # Fewer chunks: fewer partial sums to write and add. More chunks: every multiprocessor has work.
    tiles_per_chunk = triton.cdiv(tiles * blocks, 8 * multiprocessors(x.device))
    chunks = triton.cdiv(tiles, tiles_per_chunk)
    df_partials = dfilters
    if filters is not None and parts > 1:
        df_partials = torch.empty(parts, filters.numel(), dtype=torch.float32, device=x.device)
    ds_partials = torch.empty(chunks, kernel_size * channels, dtype=torch.float32, device=x.device)
    with on_device(x):
        _backward_kernel[(blocks * chunks,)](
            dy_rows.tensor,
            x_rows.tensor,
            f_rows.tensor,
            x if static_filter is None else static_filter.contiguous(),
            position_rows.tensor,
            state_rows(initial_state, x),
            dx,
            ds_partials if df_partials is None else df_partials,
            ds_partials,
            state_rows(dstate, x),
            batch,
            tokens,
            channels,
            dy_rows.stride_b,
            dy_rows.stride_t,
            x_rows.stride_b,
            x_rows.stride_t,
            f_rows.stride_b,
            f_rows.stride_t,
            position_rows.stride_b,
            position_rows.stride_t,
            tiles_per_chunk,
            DY_ALIGNMENT=dy_rows.alignment,
            X_ALIGNMENT=x_rows.alignment,
            F_ALIGNMENT=f_rows.alignment,
            HEADS=heads,
            P=head_size,
            W=kernel_size,
            RESIDUAL=residual,
            HAS_FILTERS=filters is not None,
            HAS_STATIC=static_filter is not None,
            HAS_POSITIONS=positions is not None,
            HAS_STATE=has_state,
            **sizes,
        )
    if dfilters is not None and parts > 1:
        sum_partials(df_partials, dfilters)
    if dstatic is not None:
        sum_partials(ds_partials, dstatic)
    return gradients


def _heads_and_kernel_size(filters: torch.Tensor | None, static_filter: torch.Tensor | None) -> tuple[int, int]:
    """Without head-wise filters, all channels count as one head."""
    return (1, static_filter.shape[0]) if filters is None else (filters.shape[2], filters.shape[3])


def _blocks(heads: int, head_size: int, sizes: dict[str, int]) -> int:
    return triton.cdiv(heads, sizes["BH"]) * triton.cdiv(head_size, sizes["BP"])
