"""Low-rank dynamic convolution in Triton for half precision: x is read once, and its earlier tokens stay in registers.

See `lowrank_runs` for how the tokens of a program are arranged, and for the shape suffixes.
"""

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, flat_rows, multiprocessors, on_device, rows, state_rows, up_to_registers
from .lowrank_runs import (
    GROUP,
    RANKS,
    RUNS,
    aligned_rows,
    basis_columns,
    fits_offsets,
    load_pair_coefficients,
    load_token,
    load_token_positions,
    run_offsets,
    split_tokens,
    store_token,
    where_counts,
)
from .lowrank_tiles import load_basis

__all__ = ["covers_forward", "forward"]

_GROUPS = 4
_SHORTEST, _LONGEST = 8, 64
_SHAPE_ARGUMENTS = ["T", "x_stride_b", "z_stride_b", "positions_stride_b", "length"]


@triton.jit
def _load_before(
    x_ptr,
    stride_t,
    state_ptr,
    t,
    row_G,
    offset_VGC,
    d_VC,
    keep_VGC,
    T,
    D,
    STATE: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """x at token t of each run, x_ptr being there; from the state where that is before the sequence."""
    x_VGC = load_token(x_ptr, t, row_G, offset_VGC, keep_VGC, T)
    if HAS_STATE:
        s_G = t + row_G + STATE
        mask_VGC = ((t + row_G < 0) & (s_G >= 0))[None, :, None] & keep_VGC
        state_VGC = tl.load(state_ptr + (s_G[None, :, None] * D + d_VC[:, None, :]), mask=mask_VGC, other=0.0)
        x_VGC = tl.where(mask_VGC, state_VGC.to(x_VGC.dtype), x_VGC)
    return x_VGC


@triton.jit
def _feed_product(xa_VGC, xb_VGC, sum_VMN, GROUPS: tl.constexpr, DOT: tl.constexpr):
    """Adds the product of half the channels of x with zeros: 0, or nan."""
    low_a, _ = xa_VGC.reshape(GROUPS, 8, 4, 2, 4).permute(0, 1, 2, 4, 3).split()
    low_b, _ = xb_VGC.reshape(GROUPS, 8, 4, 2, 4).permute(0, 1, 2, 4, 3).split()
    x_VMK = tl.join(low_a, low_b).permute(0, 4, 1, 2, 3).reshape(GROUPS, 16, 16)
    return tl.dot(x_VMK.to(DOT), tl.zeros((GROUPS, 16, 16), DOT), sum_VMN)


@triton.jit
def _disguise(x_VGC, w: tl.constexpr, DTYPE: tl.constexpr):
    """Between bits and numbers, for taps 3 and 4 and 7: see the loop that keeps them."""
    if (w - 1) // 2 % 2 == 1:
        x_VGC = x_VGC.to(tl.int16 if x_VGC.dtype == DTYPE else DTYPE, bitcast=True)
    return x_VGC


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
    length,
    X_ALIGNMENT: tl.constexpr,
    DENSE: tl.constexpr,
    RANK: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    GROUPS: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    if DENSE:
        # One offset for x and y leaves registers for more.
        x_stride_t = D
    BD: tl.constexpr = GROUPS * 32
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    blocks, chunks_per_row = tl.cdiv(D, BD), tl.cdiv(T, 8 * length)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, first = (chunk // chunks_per_row).to(tl.int64), (chunk % chunks_per_row) * (8 * length)
    row_G = tl.arange(0, 8) * length
    d_VC = block * BD + (tl.arange(0, GROUPS) * 32)[:, None] + tl.arange(0, 32)[None, :]
    keep_VGC = (d_VC < D)[:, None, :]
    x_offset_VGC = run_offsets(row_G * x_stride_t, d_VC)
    y_offset_VGC = run_offsets(row_G * D, d_VC)
    x_ptr += b * x_stride_b * X_ALIGNMENT + first.to(tl.int64) * x_stride_t
    y_ptr += (b * T + first) * D
    z_ptr += b * z_stride_b
    positions_ptr += b * positions_stride_b
    state_ptr += b * (W - 1) * D

    d_J, r_R = block * BD + tl.arange(0, BD), tl.arange(0, 16)
    u_W = ()
    before_W = ()
    for w in tl.static_range(W):
        u_RJ = load_basis(u_ptr, s_ptr, r_R, d_J, d_J < D, D, w, W, RANK, HAS_STATIC).to(DOT)
        u_W += (basis_columns(u_RJ, GROUPS),)
        if w > 0:
            x_VGC = _load_before(
                x_ptr - w * x_stride_t,
                x_stride_t,
                state_ptr,
                first - w,
                row_G,
                x_offset_VGC,
                d_VC,
                keep_VGC,
                T,
                D,
                W - 1,
                HAS_STATE,
            )
            before_W += (_disguise(x_VGC, w, DTYPE),)
    # What the pipeliner does not fetch ahead, narrow as it is, is fetched a step ahead by hand.
    next_z_MR = load_pair_coefficients(z_ptr, z_stride_t, first, length, T, RANK)
    later_z_MR = load_pair_coefficients(z_ptr, z_stride_t, first + 2, length, T, RANK).to(tl.int16, bitcast=True)
    next_pa = load_token_positions(positions_ptr, positions_stride_t, first, row_G, T, HAS_POSITIONS)
    next_pb = load_token_positions(positions_ptr, positions_stride_t, first + 1, row_G, T, HAS_POSITIONS)
    nothing_VMN = tl.zeros((GROUPS, 16, 16), tl.float32)
    for i in tl.range(0, length // 2, num_stages=STAGES):
        t = first + 2 * i
        xa = load_token(x_ptr, t, row_G, x_offset_VGC, keep_VGC, T)
        xb = load_token(x_ptr + x_stride_t, t + 1, row_G, x_offset_VGC, keep_VGC, T)
        z_MR, pa, pb = next_z_MR.to(DOT), next_pa, next_pb
        next_z_MR = later_z_MR.to(next_z_MR.dtype, bitcast=True)
        later_z_MR = load_pair_coefficients(z_ptr, z_stride_t, t + 4, length, T, RANK).to(tl.int16, bitcast=True)
        next_pa = load_token_positions(positions_ptr, positions_stride_t, t + 2, row_G, T, HAS_POSITIONS)
        next_pb = load_token_positions(positions_ptr, positions_stride_t, t + 3, row_G, T, HAS_POSITIONS)
        # The pipeliner fetches ahead only what goes into a product.
        nothing_VMN = _feed_product(xa, xb, nothing_VMN, GROUPS, DOT)
        # x at tokens t + 1, t, t - 1, ...
        recent_W = (xb, xa)
        for w in tl.static_range(1, W):
            recent_W += (_disguise(before_W[w - 1], w, DTYPE),)
        if RESIDUAL:
            ya, yb = xa.to(tl.float32), xb.to(tl.float32)
        else:
            ya, yb = tl.zeros((GROUPS, 8, 32), tl.float32), tl.zeros((GROUPS, 8, 32), tl.float32)
        for w in tl.static_range(W):
            ka, kb = split_tokens(tl.dot(z_MR, u_W[w]), GROUPS)
            ya += where_counts(pa, w, ka * recent_W[w + 1].to(tl.float32), HAS_POSITIONS)
            yb += where_counts(pb, w, kb * recent_W[w].to(tl.float32), HAS_POSITIONS)
        store_token(y_ptr, ya, t, row_G, y_offset_VGC, keep_VGC, True, T)
        store_token(y_ptr + D, yb, t + 1, row_G, y_offset_VGC, keep_VGC, True, T)
        # The pipeliner refuses a loop that passes a value on unchanged, as tap 1's x would be to tap 3: every second
        # pair of taps is kept as integers.
        kept_W = ()
        for w in tl.static_range(1, W):
            kept_W += (_disguise(recent_W[w - 1], w, DTYPE),)
        before_W = kept_W
        x_ptr += 2 * x_stride_t
        y_ptr += 2 * D
    # Never so; without a use the product would be removed.
    if tl.sum(tl.sum(tl.sum(nothing_VMN, axis=2), axis=1), axis=0) > 0.0:
        tl.store(y_ptr, 0.0)


def _run_length(x: torch.Tensor) -> int:
    """Tokens of a run, a power of two: long ones make the basis cheap to load; all multiprocessors must have work."""
    batch, tokens, channels = x.shape
    work = batch * tokens * triton.cdiv(channels, _GROUPS * GROUP)
    length = triton.next_power_of_2(triton.cdiv(work, 4 * RUNS * multiprocessors(x.device)))
    return max(_SHORTEST, min(_LONGEST, length))


def _stages(x: torch.Tensor, stride_t: int) -> int:
    """More offsets leave no registers for the fourth stage, those of rows that are not aligned none for the third."""
    if not aligned_rows(x):
        return 2
    return 4 if stride_t == x.shape[-1] else 3


def covers_forward(x: torch.Tensor, coefficients: torch.Tensor, kernel_size: int, has_static: bool) -> bool:
    """One step of the matrix units holds all ranks; the products are in x's type, so it must be a half."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        # With one tap there is nothing to keep, and the plain kernel reads x once, too.
        and kernel_size > 1
        and coefficients.shape[-1] + has_static <= RANKS
        and (kernel_size <= 4 or aligned_rows(x))
        and fits_offsets(x, coefficients)
    )


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
    length = _run_length(x)
    blocks, chunks = triton.cdiv(channels, _GROUPS * GROUP), batch * triton.cdiv(tokens, RUNS * length)
    with on_device(x):
        _forward_kernel[(blocks * chunks,)](
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
            length,
            X_ALIGNMENT=x_rows.alignment,
            DENSE=x_rows.stride_t == channels,
            RANK=rank,
            W=kernel_size,
            RESIDUAL=residual,
            HAS_STATIC=static_filter is not None,
            HAS_POSITIONS=positions is not None,
            HAS_STATE=initial_state is not None,
            GROUPS=_GROUPS,
            # The interpreter has no bfloat16 product: it multiplies the bit patterns.
            DOT=tl.float32 if INTERPRETED else (tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16),
            STAGES=_stages(x, x_rows.stride_t),
            num_warps=_GROUPS,
            # Two taps take 83 registers, and would be kept to 80.
            **(up_to_registers(255) if kernel_size == 2 else {}),
        )
    return y
