"""Low-rank dynamic convolution in Triton, any shape and type: filters are made on chip and never written to memory.

The static filter takes part as one more rank, whose coefficient is 1 for every token.

Shape suffixes: I rows of a tile, J its channels, R a block of ranks.
"""

import torch
import triton
import triton.language as tl

from . import lowrank_half, lowrank_half_backward
from .launch import dot_settings, flat_rows, multiprocessors, on_device, rows, state_rows, up_to_registers
from .lowrank_tiles import filtered_sum, load_basis, load_coefficients
from .reduction import sum_partials
from .tiles import load_rows, store_rows, tap_counts

__all__ = ["backward", "forward"]

# Ranks that a program holds at once: the depth of one matrix-unit step.
_RANK_BLOCK = 16
_SHAPE_ARGUMENTS = ["B", "T", "x_stride_b", "z_stride_b", "dy_stride_b", "positions_stride_b", "tiles_per_chunk"]


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
    X_ALIGNMENT: tl.constexpr,
    RANK: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks, tiles = tl.cdiv(D, BD), tl.cdiv(T, BT)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, t = (tile // tiles).to(tl.int64), (tile % tiles) * BT
    d_J = block * BD + tl.arange(0, BD)
    keep_J = d_J < D
    i_I = tl.arange(0, BT)
    state_ptr += b * (W - 1) * D
    y_IJ = filtered_sum(
        x_ptr + b * x_stride_b * X_ALIGNMENT,
        x_stride_t,
        z_ptr + b * z_stride_b,
        z_stride_t,
        u_ptr,
        s_ptr,
        positions_ptr + b * positions_stride_b,
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
        BR,
        DOT,
        PRECISION,
    )
    store_rows(y_ptr + b * T * D, state_ptr, y_IJ, t, i_I, d_J, keep_J, T, D, W - 1, False)


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def _backward_kernel(
    dy_ptr,
    x_ptr,
    z_ptr,
    u_ptr,
    s_ptr,
    positions_ptr,
    state_ptr,
    dx_ptr,
    dz_ptr,
    du_ptr,
    dstate_ptr,
    B,
    T,
    D,
    dy_stride_b,
    dy_stride_t,
    x_stride_b,
    x_stride_t,
    z_stride_b,
    z_stride_t,
    positions_stride_b,
    positions_stride_t,
    tiles_per_chunk,
    DY_ALIGNMENT: tl.constexpr,
    X_ALIGNMENT: tl.constexpr,
    RANK: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    TAPS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk of tiles by a block of channels by a block of ranks by a block of taps.

    dz_ptr: (blocks of taps, blocks of channels, B, T, RANK) and du_ptr: (chunks, RANK + HAS_STATIC, W, D), float32,
    are to be summed over chunks and over blocks. dx comes whole from the programs of the first ranks and taps.
    """
    STATE: tl.constexpr = W - 1
    # Rows start before 0 where the state wants a gradient.
    START: tl.constexpr = -STATE if HAS_STATE else 0
    blocks, tiles = tl.cdiv(D, BD), tl.cdiv(T - START, BT)
    block, chunk, rank_block = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1)
    d_J = block * BD + tl.arange(0, BD)
    keep_J = d_J < D
    i_I = tl.arange(0, BT)
    r_R = rank_block * BR + tl.arange(0, BR)
    first_w = tl.program_id(2) * TAPS
    dz_ptr += ((tl.program_id(2) * blocks + block).to(tl.int64) * B * T) * RANK

    du_W = ()
    for _ in tl.static_range(TAPS):
        du_W += (tl.zeros((BR, BD), tl.float32),)
    for tile in range(chunk * tiles_per_chunk, min((chunk + 1) * tiles_per_chunk, B * tiles)):
        b, t = (tile // tiles).to(tl.int64), START + (tile % tiles) * BT
        dy_b_ptr = dy_ptr + b * dy_stride_b * DY_ALIGNMENT
        x_b_ptr = x_ptr + b * x_stride_b * X_ALIGNMENT
        z_b_ptr = z_ptr + b * z_stride_b
        positions_b_ptr = positions_ptr + b * positions_stride_b
        if (rank_block == 0) & (first_w == 0):
            dx_IJ = filtered_sum(
                dy_b_ptr,
                dy_stride_t,
                z_b_ptr,
                z_stride_t,
                u_ptr,
                s_ptr,
                positions_b_ptr,
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
                False,
                True,
                BR,
                DOT,
                PRECISION,
            )
            store_rows(
                dx_ptr + b * T * D,
                dstate_ptr + b * STATE * D,
                dx_IJ,
                t,
                i_I,
                d_J,
                keep_J,
                T,
                D,
                STATE,
                HAS_STATE,
            )
        dy_IJ = load_rows(dy_b_ptr, dy_stride_t, state_ptr, t, i_I, d_J, keep_J, T, D, STATE, False).to(tl.float32)
        z_IR = load_coefficients(z_b_ptr, z_stride_t, t, i_I, r_R, T, RANK, HAS_STATIC).to(DOT)
        dz_IR = tl.zeros((BT, BR), tl.float32)
        new_du_W = ()
        for tap in tl.static_range(TAPS):
            # Past the last tap the last one stands in, and does not count.
            w = tl.minimum(first_w + tap, W - 1)
            x_IJ = load_rows(
                x_b_ptr, x_stride_t, state_ptr + b * STATE * D, t, i_I - w, d_J, keep_J, T, D, STATE, HAS_STATE
            )
            counts_I = tap_counts(positions_b_ptr, positions_stride_t, t + i_I, w, T, HAS_POSITIONS)
            counts_I = counts_I & (first_w + tap + tl.zeros((BT,), tl.int32) < W)
            g_IJ = tl.where(counts_I[:, None], dy_IJ * x_IJ.to(tl.float32), 0.0).to(DOT)
            u_RJ = load_basis(u_ptr, s_ptr, r_R, d_J, keep_J, D, w, W, RANK, False).to(DOT)
            dz_IR = tl.dot(g_IJ, tl.trans(u_RJ), dz_IR, input_precision=PRECISION)
            new_du_W += (tl.dot(tl.trans(z_IR), g_IJ, du_W[tap], input_precision=PRECISION),)
        du_W = new_du_W
        row_I = t + i_I
        dz_offset_I = (b * T + row_I) * RANK
        tl.store(
            dz_ptr + dz_offset_I[:, None] + r_R[None, :],
            dz_IR,
            mask=((row_I >= 0) & (row_I < T))[:, None] & (r_R < RANK)[None, :],
        )
    du_ptr += chunk.to(tl.int64) * ((RANK + HAS_STATIC) * W) * D
    for tap in tl.static_range(TAPS):
        w = first_w + tap
        du_offset_R = (r_R.to(tl.int64) * W + w) * D
        tl.store(
            du_ptr + du_offset_R[:, None] + d_J[None, :],
            du_W[tap],
            mask=(r_R < tl.where(w < W, RANK + HAS_STATIC, 0))[:, None] & keep_J[None, :],
        )


def _block_sizes(x: torch.Tensor, kernel_size: int) -> dict[str, int]:
    # What registers hold without spilling; 16 is the least a matrix unit takes.
    narrow = (kernel_size > 4) + (x.dtype == torch.float32)
    return {"BT": 16, "BD": max(16, min(64 >> narrow, triton.next_power_of_2(x.shape[-1]))), "BR": _RANK_BLOCK}


def forward(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> torch.Tensor:
    """y (B, T, D), contiguous, in x's dtype; see `api` for the arguments."""
    batch, tokens, channels = x.shape
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if lowrank_half.covers_forward(x, coefficients, basis.shape[1], static_filter is not None):
        return lowrank_half.forward(x, coefficients, basis, static_filter, residual, positions, initial_state)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows, z_rows, position_rows = rows(x), rows(coefficients, wide=False), flat_rows(positions, x)
    basis = basis.contiguous()
    rank, kernel_size, _ = basis.shape
    sizes = _block_sizes(x, kernel_size)
    programs = triton.cdiv(channels, sizes["BD"]) * triton.cdiv(tokens, sizes["BT"]) * batch
    with on_device(x):
        _forward_kernel[(programs,)](
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
            X_ALIGNMENT=x_rows.alignment,
            RANK=rank,
            W=kernel_size,
            RESIDUAL=residual,
            HAS_STATIC=static_filter is not None,
            HAS_POSITIONS=positions is not None,
            HAS_STATE=initial_state is not None and kernel_size > 1,
            **sizes,
            **(up_to_registers(255) if kernel_size > 5 else {}),
            **dot_settings(x.dtype),
        )
    return y


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x, coefficients, basis, static filter and initial state, each contiguous, in its dtype."""
    gradients = tuple(
        None if a is None else torch.empty(a.shape, dtype=a.dtype, device=a.device)
        for a in (x, coefficients, basis, static_filter, initial_state)
    )
    dx, dcoefficients, dbasis, dstatic, dstate = gradients
    if x.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return gradients
    if lowrank_half_backward.covers(x, coefficients, basis, static_filter, initial_state):
        lowrank_half_backward.backward(dy, x, coefficients, basis, static_filter, residual, positions, gradients[:4])
        return gradients
    batch, tokens, channels = x.shape
    dy_rows, x_rows, z_rows, position_rows = rows(dy), rows(x), rows(coefficients, wide=False), flat_rows(positions, x)
    basis = basis.contiguous()
    rank, kernel_size, _ = basis.shape
    ranks = rank + (static_filter is not None)
    has_state = initial_state is not None and kernel_size > 1
    sizes = _block_sizes(x, kernel_size)
    masked = positions is not None or has_state
    # A program's taps are unrolled: with masks, more than two spill registers; but of many ranks in bfloat16, two do.
    many = kernel_size == 4 and ranks > 32 and x.dtype == basis.dtype == torch.bfloat16
    taps = min(kernel_size, 2 if masked and not many else 4)
    blocks, rank_blocks = triton.cdiv(channels, sizes["BD"]), triton.cdiv(ranks, sizes["BR"])
    tap_blocks = triton.cdiv(kernel_size, taps)
    tiles = batch * triton.cdiv(tokens + (kernel_size - 1 if has_state else 0), sizes["BT"])
    # Fewer chunks: fewer partial sums to write and add. More chunks: every multiprocessor has work.
    tiles_per_chunk = triton.cdiv(tiles * blocks * rank_blocks * tap_blocks, 4 * multiprocessors(x.device))
    chunks = triton.cdiv(tiles, tiles_per_chunk)
    dz_partials = torch.empty(tap_blocks * blocks, coefficients.numel(), dtype=torch.float32, device=x.device)
    du_partials = torch.empty(chunks, ranks * kernel_size * channels, dtype=torch.float32, device=x.device)
    with on_device(x):
        _backward_kernel[(blocks * chunks, rank_blocks, tap_blocks)](
            dy_rows.tensor,
            x_rows.tensor,
            z_rows.tensor,
            basis,
            basis if static_filter is None else static_filter.contiguous(),
            position_rows.tensor,
            state_rows(initial_state, x),
            dx,
            dz_partials,
            du_partials,
            state_rows(dstate, x),
            batch,
            tokens,
            channels,
            dy_rows.stride_b,
            dy_rows.stride_t,
            x_rows.stride_b,
            x_rows.stride_t,
            z_rows.stride_b,
            z_rows.stride_t,
            position_rows.stride_b,
            position_rows.stride_t,
            tiles_per_chunk,
            DY_ALIGNMENT=dy_rows.alignment,
            X_ALIGNMENT=x_rows.alignment,
            RANK=rank,
            W=kernel_size,
            RESIDUAL=residual,
            HAS_STATIC=static_filter is not None,
            HAS_POSITIONS=positions is not None,
            HAS_STATE=has_state,
            **sizes,
            TAPS=taps,
            num_warps=8,
            # Most variants take more than 128 registers; others would be kept to them, and spill.
            **(up_to_registers(255) if kernel_size != 4 else {}),
            **dot_settings(x.dtype),
        )
    sum_partials(dz_partials, dcoefficients)
    sum_partials(du_partials, dbasis, dstatic)
    return gradients
