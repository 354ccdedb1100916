"""Low-rank dynamic convolution in Triton for half precision, where the matrix units have time to spare.

The plain kernel (`lowrank`) reads x once for each tap and moves each copy into the matrix units' layout through
shared memory, which takes longer than main memory does. Here x is read once: a product with a shifted identity moves
it by w rows and leaves it in the layout of the filters. Such a product is exact, as each sum has one term that is
not zero. But it spreads inf and nan to other rows, where they do not belong; a program that meets them does its tiles
again in the plain way.

Shape suffixes: I rows of a tile, J its channels, R ranks, K the 16 rows before the tile, H half of a tile's rows.
"""

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, flat_rows, multiprocessors, on_device, rows, state_rows
from .lowrank_tiles import filtered_sum, load_basis
from .tiles import load_rows, store_rows, tap_counts

__all__ = ["covers_forward", "forward"]

# One step of the matrix units: rows of a tile, and ranks, the static filter's among them.
_STEP = 16
_BLOCK = 128
_MOST_TILES = 32
_SHAPE_ARGUMENTS = ["T", "x_stride_b", "z_stride_b", "positions_stride_b", "tiles_per_chunk"]


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def _forward_kernel(
    x_ptr,
    z_ptr,
    u_ptr,
    s_ptr,
    positions_ptr,
    state_ptr,
    y_ptr,
    T,
    D,
    x_stride_b,
    x_stride_t,
    z_stride_b,
    z_stride_t,
    positions_stride_b,
    positions_stride_t,
    tiles_per_chunk,
    X_ALIGNMENT: tl.constexpr,
    RANK: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    STEP: tl.constexpr,
    BD: tl.constexpr,
    REDO: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks, tiles = tl.cdiv(D, BD), tl.cdiv(T, STEP)
    chunks = tl.cdiv(tiles, tiles_per_chunk)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, first = (chunk // chunks).to(tl.int64), (chunk % chunks) * tiles_per_chunk
    count = min(tiles_per_chunk, tiles - first)
    d_J = block * BD + tl.arange(0, BD)
    keep_J = d_J < D
    i_I = tl.arange(0, STEP)
    x_ptr += b * x_stride_b * X_ALIGNMENT
    z_ptr += b * z_stride_b
    positions_ptr += b * positions_stride_b
    state_ptr += b * (W - 1) * D
    y_ptr += b * T * D

    u_W = ()
    shift_W = ()
    carry_W = ()
    for w in tl.static_range(W):
        u_W += (load_basis(u_ptr, s_ptr, i_I, d_J, keep_J, D, w, W, RANK, HAS_STATIC).to(DOT),)
        # Row i of the tile takes row i - w; where that is negative, row i - w + 16 of the tile before.
        shift_W += ((i_I[:, None] - i_I[None, :] == w).to(DOT),)
        carry_W += ((i_I[:, None] - i_I[None, :] + STEP == w).to(DOT),)
    # What the pipeliner does not fetch ahead, as it feeds no product directly, is fetched a tile ahead by hand.
    z_IR = _load_coefficients(z_ptr, z_stride_t, first * STEP, i_I, T, RANK)
    poison_HJ = tl.zeros((STEP // 2, BD // 2), tl.float32)
    for tile in tl.range(0, count, num_stages=STAGES):
        t = (first + tile) * STEP
        x_IJ = load_rows(x_ptr, x_stride_t, state_ptr, t, i_I, d_J, keep_J, T, D, W - 1, False).to(DOT)
        now_z_IR = z_IR.to(DOT)
        z_IR = _load_coefficients(z_ptr, z_stride_t, t + STEP, i_I, T, RANK)
        x_0_IJ = tl.dot(shift_W[0], x_IJ)
        y_IJ = x_0_IJ if RESIDUAL else tl.zeros((STEP, BD), tl.float32)
        if W > 1:
            needed_I = i_I > STEP - W
            before_KJ = _load_before(
                x_ptr, x_stride_t, state_ptr, t, i_I - STEP, needed_I, d_J, keep_J, D, W - 1, HAS_STATE
            ).to(DOT)
        for w in tl.static_range(W):
            x_w_IJ = x_0_IJ if w == 0 else tl.dot(carry_W[w], before_KJ, tl.dot(shift_W[w], x_IJ))
            term_IJ = x_w_IJ * tl.dot(now_z_IR, u_W[w])
            if HAS_POSITIONS:
                counts_I = tap_counts(positions_ptr, positions_stride_t, t + i_I, w, T, True)
                term_IJ = tl.where(counts_I[:, None], term_IJ, 0.0)
            y_IJ += term_IJ
        # What is not finite spreads to all rows, so that half of them show it: 0 for as long as all is finite.
        shown_HJ, _ = x_w_IJ.reshape(2, STEP // 2, BD).permute(1, 2, 0).split()
        even_HJ, odd_HJ = shown_HJ.reshape(STEP // 2, BD // 2, 2).split()
        poison_HJ += (even_HJ + odd_HJ) * 0.0
        store_rows(y_ptr, state_ptr, y_IJ, t, i_I, d_J, keep_J, T, D, W - 1, False)
    if tl.sum(tl.sum(poison_HJ, axis=1), axis=0) != 0.0:
        _redo(
            x_ptr,
            x_stride_t,
            z_ptr,
            z_stride_t,
            u_ptr,
            s_ptr,
            positions_ptr,
            positions_stride_t,
            state_ptr,
            y_ptr,
            first,
            count,
            block * BD,
            T,
            D,
            RANK,
            W,
            RESIDUAL,
            HAS_STATIC,
            HAS_POSITIONS,
            HAS_STATE,
            STEP,
            BD,
            REDO,
            DOT,
        )


@triton.jit
def _redo(
    x_ptr,
    x_stride_t,
    z_ptr,
    z_stride_t,
    u_ptr,
    s_ptr,
    positions_ptr,
    positions_stride_t,
    state_ptr,
    y_ptr,
    first,
    count,
    d,
    T,
    D,
    RANK: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    STEP: tl.constexpr,
    BD: tl.constexpr,
    REDO: tl.constexpr,
    DOT: tl.constexpr,
):
    """The tiles in the plain way, REDO channels at a time: this is rare, and must not cost the other way registers."""
    PARTS: tl.constexpr = BD // REDO
    i_I = tl.arange(0, STEP)
    for part in range(count * PARTS):
        t = (first + part // PARTS) * STEP
        d_J = d + (part % PARTS) * REDO + tl.arange(0, REDO)
        keep_J = d_J < D
        y_IJ = filtered_sum(
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
            RANK,
            W,
            RESIDUAL,
            HAS_STATIC,
            HAS_POSITIONS,
            HAS_STATE,
            False,
            STEP,
            DOT,
            "ieee",
        )
        store_rows(y_ptr, state_ptr, y_IJ, t, i_I, d_J, keep_J, T, D, W - 1, False)


@triton.jit
def _load_coefficients(z_ptr, stride_t, t, i_I, T, RANK: tl.constexpr):
    """The static filter's coefficient is 1; columns after it meet a basis of zeros, rows after T are not stored."""
    return tl.load(
        z_ptr + t.to(tl.int64) * stride_t + (i_I[:, None] * stride_t + i_I[None, :]),
        mask=(t + i_I < T)[:, None] & (i_I < RANK)[None, :],
        other=1.0,
    )


@triton.jit
def _load_before(
    x_ptr,
    stride_t,
    state_ptr,
    t,
    i_K,
    needed_K,
    d_J,
    keep_J,
    D,
    STATE: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """The rows before a tile; only those which a tap reaches are read."""
    row_K = t + i_K
    x_KJ = tl.load(
        x_ptr + t.to(tl.int64) * stride_t + (i_K[:, None] * stride_t + d_J[None, :]),
        mask=((row_K >= 0) & needed_K)[:, None] & keep_J[None, :],
        other=0.0,
    )
    if HAS_STATE:
        s_K = row_K + STATE
        mask_K = (row_K < 0) & (s_K >= 0)
        state_KJ = tl.load(
            state_ptr + s_K[:, None] * D + d_J[None, :], mask=mask_K[:, None] & keep_J[None, :], other=0.0
        )
        x_KJ = tl.where(mask_K[:, None], state_KJ.to(x_KJ.dtype), x_KJ)
    return x_KJ


def covers_forward(x: torch.Tensor, rank: int, has_static: bool) -> bool:
    """One step of the matrix units holds all ranks; the products are in x's type, so it must be a half."""
    return x.dtype in (torch.bfloat16, torch.float16) and rank + has_static <= _STEP


def forward(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> torch.Tensor:
    """As `lowrank.forward`, for inputs that `covers_forward` accepts and that are not empty."""
    batch, tokens, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows, z_rows, position_rows = rows(x), rows(coefficients, wide=False), flat_rows(positions, x)
    basis = basis.contiguous()
    rank, kernel_size, _ = basis.shape
    width = _BLOCK if channels > 64 else 64
    blocks, tiles = triton.cdiv(channels, width), triton.cdiv(tokens, _STEP)
    # Long chunks make the basis cheap to load; all multiprocessors must have work.
    tiles_per_chunk = min(_MOST_TILES, triton.cdiv(tiles * blocks * batch, 4 * multiprocessors(x.device)))
    with on_device(x):
        _forward_kernel[(blocks * triton.cdiv(tiles, tiles_per_chunk) * batch,)](
            x_rows.tensor,
            z_rows.tensor,
            basis,
            basis if static_filter is None else static_filter.contiguous(),
            position_rows.tensor,
            state_rows(initial_state, x),
            y,
            tokens,
            channels,
            x_rows.stride_b,
            x_rows.stride_t,
            z_rows.stride_b,
            z_rows.stride_t,
            position_rows.stride_b,
            position_rows.stride_t,
            tiles_per_chunk,
            X_ALIGNMENT=x_rows.alignment,
            RANK=rank,
            W=kernel_size,
            RESIDUAL=residual,
            HAS_STATIC=static_filter is not None,
            HAS_POSITIONS=positions is not None,
            HAS_STATE=initial_state is not None and kernel_size > 1,
            STEP=_STEP,
            BD=width,
            REDO=32,
            # The interpreter has no bfloat16 product: it multiplies the bit patterns.
            DOT=tl.float32 if INTERPRETED else (tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16),
            STAGES=4,
            num_warps=4,
        )
    return y
