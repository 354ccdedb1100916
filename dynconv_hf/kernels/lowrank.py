"""Low-rank dynamic convolution in Triton, any shape and type: filters are made on chip and never written to memory.

The static filter takes part as one more rank, whose coefficient is 1 for every token.

Shape suffixes: I rows of a tile, J its channels, R a block of ranks, W the taps of a program.
"""

import sys
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import lowrank_half, lowrank_half_backward
from .launch import dot_settings, flat_rows, multiprocessors, on_device, rows, state_rows, up_to_registers
from .lowrank_runs import aligned_rows
from .lowrank_tiles import load_basis, load_coefficients
from .reduction import sum_partials
from .tiles import load_positions, load_rows, store_rows, tap_counts

__all__ = ["backward", "forward", "launched"]

# Tokens of a tile of the filtered sum.
_TOKENS = 32
# Programs of the filters' gradients for a multiprocessor, which runs two or three at once.
_PROGRAMS = 6
_SHAPE_ARGUMENTS = ["B", "T", "x_stride_b", "z_stride_b", "dy_stride_b", "positions_stride_b", "tiles_per_chunk"]


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def _filtered_sum_kernel(
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
    TRANSPOSED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(x[t]) + sum_w k[t, w] * x[t - w]; transposed, what x's gradient is: (x[t]) + sum_w k[t + w, w] * x[t + w].

    state_ptr: (B, W - 1, D), the rows of x before 0, which are read; transposed, those of y, which are written.
    """
    STATE: tl.constexpr = W - 1
    # Rows start before 0 where the state wants a gradient.
    START: tl.constexpr = -STATE if TRANSPOSED and HAS_STATE else 0
    blocks, tiles = tl.cdiv(D, BD), tl.cdiv(T - START, BT)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, t = (tile // tiles).to(tl.int64), START + (tile % tiles) * BT
    d_J, i_I, r_R = block * BD + tl.arange(0, BD), tl.arange(0, BT), tl.arange(0, BR)
    keep_J = d_J < D
    x_ptr += b * x_stride_b * X_ALIGNMENT
    z_ptr += b * z_stride_b
    positions_ptr += b * positions_stride_b
    state_ptr += b * STATE * D
    if RESIDUAL:
        y_IJ = load_rows(x_ptr, x_stride_t, state_ptr, t, i_I, d_J, keep_J, T, D, STATE, False).to(tl.float32)
    else:
        y_IJ = tl.zeros((BT, BD), tl.float32)
    # A loop that is not unrolled: unrolled, all taps' loads come first, and registers spill.
    for w in tl.range(0, W, num_stages=1):
        filter_i_I = i_I + w if TRANSPOSED else i_I
        x_i_I = i_I + w if TRANSPOSED else i_I - w
        k_IJ = tl.zeros((BT, BD), tl.float32)
        for r in tl.range(0, RANK + HAS_STATIC, BR, num_stages=1):
            z_IR = load_coefficients(z_ptr, z_stride_t, t, filter_i_I, r + r_R, T, RANK, HAS_STATIC)
            u_RJ = load_basis(u_ptr, s_ptr, r + r_R, d_J, keep_J, D, w, W, RANK, HAS_STATIC)
            k_IJ = tl.dot(z_IR.to(DOT), u_RJ.to(DOT), k_IJ, input_precision=PRECISION)
        x_IJ = load_rows(
            x_ptr, x_stride_t, state_ptr, t, x_i_I, d_J, keep_J, T, D, STATE, HAS_STATE and not TRANSPOSED
        )
        counts_I = tap_counts(positions_ptr, positions_stride_t, t + filter_i_I, w, T, HAS_POSITIONS)
        # `where`, not a product with the mask: what a token must not see may be inf or nan.
        y_IJ += tl.where(counts_I[:, None], k_IJ * x_IJ.to(tl.float32), 0.0)
    store_rows(y_ptr + b * T * D, state_ptr, y_IJ, t, i_I, d_J, keep_J, T, D, STATE, HAS_STATE and TRANSPOSED)


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def _filter_gradient_kernel(
    dy_ptr,
    x_ptr,
    z_ptr,
    u_ptr,
    positions_ptr,
    state_ptr,
    dz_ptr,
    du_ptr,
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
    are to be summed over chunks and over blocks.
    """
    STATE: tl.constexpr = W - 1
    blocks, tiles = tl.cdiv(D, BD), tl.cdiv(T, BT)
    block, chunk, rank_block = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1)
    d_J, i_I, r_R = block * BD + tl.arange(0, BD), tl.arange(0, BT), rank_block * BR + tl.arange(0, BR)
    keep_J = d_J < D
    first_w = tl.program_id(2) * TAPS
    dz_ptr += ((tl.program_id(2) * blocks + block).to(tl.int64) * B * T) * RANK

    u_W = ()
    du_W = ()
    for tap in tl.static_range(TAPS):
        # Past the last tap the basis is 0, and its gradient is not stored.
        w = first_w + tap
        counts_J = d_J < tl.where(w < W, D, 0)
        u_W += (load_basis(u_ptr, u_ptr, r_R, d_J, counts_J, D, w, W, RANK, False).to(DOT),)
        du_W += (tl.zeros((BR, BD), tl.float32),)
    for tile in range(chunk * tiles_per_chunk, min((chunk + 1) * tiles_per_chunk, B * tiles)):
        b, t = (tile // tiles).to(tl.int64), (tile % tiles) * BT
        dy_b_ptr = dy_ptr + b * dy_stride_b * DY_ALIGNMENT
        x_b_ptr = x_ptr + b * x_stride_b * X_ALIGNMENT
        state_b_ptr = state_ptr + b * STATE * D
        dy_IJ = load_rows(dy_b_ptr, dy_stride_t, state_b_ptr, t, i_I, d_J, keep_J, T, D, STATE, False)
        z_IR = load_coefficients(z_ptr + b * z_stride_b, z_stride_t, t, i_I, r_R, T, RANK, HAS_STATIC).to(DOT)
        row_I = t + i_I
        if HAS_POSITIONS:
            position_I = load_positions(positions_ptr + b * positions_stride_b, positions_stride_t, row_I, T)
        dz_IR = tl.zeros((BT, BR), tl.float32)
        new_du_W = ()
        for tap in tl.static_range(TAPS):
            # Past the last tap, x is the last one's: no other token's, which may be inf or nan.
            w = tl.minimum(first_w + tap, W - 1)
            x_IJ = load_rows(x_b_ptr, x_stride_t, state_b_ptr, t, i_I - w, d_J, keep_J, T, D, STATE, HAS_STATE)
            g_IJ = dy_IJ.to(DOT) * x_IJ.to(DOT)
            if HAS_POSITIONS:
                g_IJ = tl.where((position_I >= w)[:, None], g_IJ, 0.0)
            dz_IR = tl.dot(g_IJ, tl.trans(u_W[tap]), dz_IR, input_precision=PRECISION)
            new_du_W += (tl.dot(tl.trans(z_IR), g_IJ, du_W[tap], input_precision=PRECISION),)
        du_W = new_du_W
        tl.store(
            dz_ptr + ((b * T + row_I) * RANK)[:, None] + r_R[None, :],
            dz_IR,
            mask=(row_I < T)[:, None] & (r_R < RANK)[None, :],
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


def _channel_block(most: int, channels: int) -> int:
    """A power of two, of 16 or more: the least that a matrix unit takes."""
    return max(16, min(most, triton.next_power_of_2(channels)))


def _rank_block(ranks: int) -> int:
    return 16 if ranks <= 16 else 32


def _filtered_sum(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    state: torch.Tensor | None,
    y: torch.Tensor,
    transposed: bool,
) -> None:
    """Fills y; transposed, also the state, which is contiguous then."""
    batch, tokens, channels = x.shape
    x_rows, z_rows, position_rows = rows(x), rows(coefficients, wide=False), flat_rows(positions, x)
    rank, kernel_size, _ = basis.shape
    has_state = state is not None and kernel_size > 1
    exact = x.dtype == torch.float32
    # Products without matrix units have their operands in registers; rows that are not aligned have more offsets.
    block = _channel_block((64 if exact else 128) // (1 if aligned_rows(x) else 2), channels)
    tiles = triton.cdiv(tokens + (kernel_size - 1 if has_state and transposed else 0), _TOKENS)
    with on_device(x):
        _filtered_sum_kernel[(triton.cdiv(channels, block) * tiles * batch,)](
            x_rows.tensor,
            z_rows.tensor,
            basis.contiguous(),
            basis if static_filter is None else static_filter.contiguous(),
            position_rows.tensor,
            state_rows(state, x),
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
            HAS_STATE=has_state,
            TRANSPOSED=transposed,
            BT=_TOKENS,
            BD=block,
            BR=16 if exact else _rank_block(rank + (static_filter is not None)),
            num_warps=4,
            **up_to_registers(255),
            **dot_settings(x.dtype),
        )


def _forward_module(
    x: torch.Tensor, coefficients: torch.Tensor, basis: torch.Tensor, static_filter: torch.Tensor | None
) -> ModuleType:
    """Whose kernels make y: what `forward` launches, and `launched` tells."""
    covered = lowrank_half.covers_forward(x, coefficients, basis.shape[1], static_filter is not None)
    return lowrank_half if covered else sys.modules[__name__]


def _backward_module(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> ModuleType:
    """Whose kernels make the gradients: what `backward` launches, and `launched` tells."""
    covered = lowrank_half_backward.covers(x, coefficients, basis, static_filter, initial_state)
    return lowrank_half_backward if covered else sys.modules[__name__]


def launched(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> str:
    """The modules whose kernels `forward` and `backward` launch for these inputs, such as "lowrank_half / lowrank"."""
    modules = (
        _forward_module(x, coefficients, basis, static_filter),
        _backward_module(x, coefficients, basis, static_filter, initial_state),
    )
    return " / ".join(dict.fromkeys(module.__name__.rpartition(".")[2] for module in modules))


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
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if _forward_module(x, coefficients, basis, static_filter) is lowrank_half:
        return lowrank_half.forward(x, coefficients, basis, static_filter, residual, positions, initial_state)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _filtered_sum(x, coefficients, basis, static_filter, residual, positions, initial_state, y, False)
    return y


class _Sizes(NamedTuple):
    """What a program of the filters' gradients takes at once, as much as registers hold; how many steps overlap."""

    tokens: int
    channels: int
    ranks: int
    taps: int
    stages: int = 2


def _gradient_sizes(x: torch.Tensor, ranks: int, kernel_size: int, has_state: bool) -> _Sizes:
    channels, aligned = x.shape[-1], aligned_rows(x)
    # Rows that are not aligned have more offsets; the state is a second place to read x from.
    roomy = aligned and not has_state
    if x.dtype == torch.float32:
        if roomy and channels >= 64:
            return _Sizes(64, 64, 16, taps=1, stages=1)
        return _Sizes(16, 16, 16, taps=min(kernel_size, 2))
    # float16 is multiplied as tf32, see `dot_settings`. Six taps are three and three, not four and two.
    taps = triton.cdiv(kernel_size, triton.cdiv(kernel_size, 4 if roomy and x.dtype == torch.bfloat16 else 2))
    tokens, most_channels = (32, 64) if aligned else (16, 32)
    return _Sizes(tokens, _channel_block(most_channels, channels), _rank_block(ranks), taps)


def _filter_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    dcoefficients: torch.Tensor,
    dbasis: torch.Tensor,
    dstatic: torch.Tensor | None,
) -> None:
    batch, tokens, channels = x.shape
    dy_rows, x_rows, z_rows, position_rows = rows(dy), rows(x), rows(coefficients, wide=False), flat_rows(positions, x)
    rank, kernel_size, _ = basis.shape
    ranks = rank + (dstatic is not None)
    has_state = initial_state is not None and kernel_size > 1
    sizes = _gradient_sizes(x, ranks, kernel_size, has_state)
    blocks, rank_blocks = triton.cdiv(channels, sizes.channels), triton.cdiv(ranks, sizes.ranks)
    tap_blocks = triton.cdiv(kernel_size, sizes.taps)
    tiles = batch * triton.cdiv(tokens, sizes.tokens)
    # Fewer chunks: fewer partial sums to write and add. More chunks: every multiprocessor has work.
    tiles_per_chunk = triton.cdiv(tiles * blocks * rank_blocks * tap_blocks, _PROGRAMS * multiprocessors(x.device))
    chunks = triton.cdiv(tiles, tiles_per_chunk)
    dz_partials = torch.empty(tap_blocks * blocks, coefficients.numel(), dtype=torch.float32, device=x.device)
    du_partials = torch.empty(chunks, ranks * kernel_size * channels, dtype=torch.float32, device=x.device)
    with on_device(x):
        _filter_gradient_kernel[(blocks * chunks, rank_blocks, tap_blocks)](
            dy_rows.tensor,
            x_rows.tensor,
            z_rows.tensor,
            basis.contiguous(),
            position_rows.tensor,
            state_rows(initial_state, x),
            dz_partials,
            du_partials,
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
            HAS_STATIC=dstatic is not None,
            HAS_POSITIONS=positions is not None,
            HAS_STATE=has_state,
            BT=sizes.tokens,
            BD=sizes.channels,
            BR=sizes.ranks,
            TAPS=sizes.taps,
            num_warps=4,
            num_stages=sizes.stages,
            **up_to_registers(255),
            **dot_settings(x.dtype),
        )
    sum_partials(dz_partials, dcoefficients)
    sum_partials(du_partials, dbasis, dstatic)


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
    if _backward_module(x, coefficients, basis, static_filter, initial_state) is lowrank_half_backward:
        lowrank_half_backward.backward(dy, x, coefficients, basis, static_filter, residual, positions, gradients[:4])
        return gradients
    # Both launches read these: what has to be copied is copied once.
    dy, coefficients, basis = rows(dy).tensor, rows(coefficients, wide=False).tensor, basis.contiguous()
    _filtered_sum(dy, coefficients, basis, static_filter, residual, positions, dstate, dx, True)
    _filter_gradients(dy, x, coefficients, basis, positions, initial_state, dcoefficients, dbasis, dstatic)
    return gradients
