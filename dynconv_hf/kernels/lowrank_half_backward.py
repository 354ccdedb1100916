"""The backward of low-rank dynamic convolution in Triton for bfloat16: one pass over x and dy.

See `lowrank_runs` for how the tokens of a program are arranged, and for the shape suffixes.

dx marches along: the filter of token t serves the gradients of tokens t to t - 3, which are sums in registers until
complete, and are written up to 3 steps late. Two further steps, over the tokens after the run, complete its last 3.
Of 2 or 3 taps, the others are 0.
"""

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, flat_rows, multiprocessors, on_device, rows
from .lowrank_runs import (
    GROUP,
    MOST_LENGTH,
    MOST_STRIDE,
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
from .reduction import ROW, sum_run_partials

__all__ = ["backward", "covers"]

_MOST_TAPS = 4
_GROUPS = 4
_SHAPE_ARGUMENTS = ["B", "T", "x_stride_b", "z_stride_b", "dy_stride_b", "positions_stride_b", "length"]


@triton.jit
def _basis_depth(u_W, GROUPS: tl.constexpr):
    """The basis with taps and channels as depth, in the order (tap, j // 2, q, j % 2, e), each group apart."""
    u = tl.join(tl.join(u_W[0], u_W[2]), tl.join(u_W[1], u_W[3])).reshape(16, GROUPS, 4, 2, 2, 2, 4)
    return u.permute(1, 6, 3, 2, 4, 5, 0).reshape(GROUPS, 128, 16)


@triton.jit
def _march(
    z_MR,
    u_W,
    dya,
    dyb,
    pa,
    pb,
    dx1,
    dx2,
    dx3,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """From the sums of dx for 1 to 3 tokens before the pair: those of 3 and 2 before, complete, and those that the
    next pair takes for 3, 2 and 1 before."""
    fa, fb = dya.to(tl.float32), dyb.to(tl.float32)
    done3, done2, dx3 = dx3, dx2, dx1
    if W > 3:
        ka, kb = split_tokens(tl.dot(z_MR, u_W[3]), GROUPS)
        done3 += where_counts(pa, 3, ka * fa, HAS_POSITIONS)
        done2 += where_counts(pb, 3, kb * fb, HAS_POSITIONS)
    if W > 2:
        ka, kb = split_tokens(tl.dot(z_MR, u_W[2]), GROUPS)
        done2 += where_counts(pa, 2, ka * fa, HAS_POSITIONS)
        dx3 += where_counts(pb, 2, kb * fb, HAS_POSITIONS)
    ka, kb = split_tokens(tl.dot(z_MR, u_W[1]), GROUPS)
    dx3 += where_counts(pa, 1, ka * fa, HAS_POSITIONS)
    dx2 = where_counts(pb, 1, kb * fb, HAS_POSITIONS)
    ka, kb = split_tokens(tl.dot(z_MR, u_W[0]), GROUPS)
    dx2 += where_counts(pa, 0, ka * fa, HAS_POSITIONS)
    dx1 = where_counts(pb, 0, kb * fb, HAS_POSITIONS)
    if RESIDUAL:
        dx2 += fa
        dx1 += fb
    return done3, done2, dx3, dx2, dx1


@triton.jit
def _filter_gradient(position_G, w: tl.constexpr, dy_VGC, x_VGC, W: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """That of tap w of a token; 0 where there is no such tap."""
    if w < W:
        g_VGC = where_counts(position_G, w, dy_VGC * x_VGC.to(dy_VGC.dtype), HAS_POSITIONS)
    else:
        g_VGC = tl.zeros(dy_VGC.shape, dy_VGC.dtype)
    return g_VGC


@triton.jit
def _no_basis_gradient(GROUPS: tl.constexpr, SPARING: tl.constexpr):
    """The start of a sum of `_add_basis_gradient`.

    SPARING: ranks are columns, not rows. On Hopper the product then reads both tiles from shared memory, which takes
    longer, but leaves more registers.
    """
    return tl.zeros((GROUPS * 128, 16), tl.float32) if SPARING else tl.zeros((16, GROUPS * 128), tl.float32)


@triton.jit
def _add_basis_gradient(du, g, z_MR, GROUPS: tl.constexpr, SPARING: tl.constexpr):
    """g (V, G, C, token of the pair, tap // 2, tap % 2)."""
    if SPARING:
        g_NM = g.reshape(GROUPS, 8, 2, 16, 2, 4).permute(5, 2, 0, 3, 4, 1).reshape(GROUPS * 128, 16)
        du = tl.dot(g_NM, z_MR, du)
    else:
        g_MN = g.reshape(GROUPS, 8, 4, 4, 2, 2, 4).permute(5, 1, 6, 3, 0, 2, 4).reshape(16, GROUPS * 128)
        du = tl.dot(tl.trans(z_MR), g_MN, du)
    return du


@triton.jit
def _basis_gradient(du, GROUPS: tl.constexpr, SPARING: tl.constexpr):
    if SPARING:
        du = du.reshape(4, 2, GROUPS, 16, 16).permute(4, 0, 2, 1, 3)
    else:
        du = du.reshape(16, 4, 4, GROUPS, 4, 2).permute(0, 1, 3, 4, 2, 5)
    return du.reshape(16, 4, GROUPS * 32)


@triton.jit
def _sum_groups(dz_VMR, GROUPS: tl.constexpr):
    """dz of all groups together, 256 values in order. Halves are added: `tl.sum` would be slower."""
    if GROUPS == 8:
        low, high = dz_VMR.reshape(2, 4, 256).permute(1, 2, 0).split()
        dz_VMR = (low + high).reshape(4, 16, 16)
    low, high = dz_VMR.reshape(2, 2, 256).permute(1, 2, 0).split()
    low, high = (low + high).reshape(2, 256).permute(1, 0).split()
    return low + high


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def _backward_kernel(
    dy_ptr,
    x_ptr,
    z_ptr,
    u_ptr,
    s_ptr,
    positions_ptr,
    dx_ptr,
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
    length,
    DY_ALIGNMENT: tl.constexpr,
    X_ALIGNMENT: tl.constexpr,
    DENSE: tl.constexpr,
    RANK: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    GROUPS: tl.constexpr,
    SPARING: tl.constexpr,
    DX_FIRST: tl.constexpr,
    ROW: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz_ptr: (blocks of channels, B, T, ROW), of which RANK count; du_ptr: (chunks, ROW, W, D), of which
    RANK + HAS_STATIC are written; to be summed over their first dimension. A chunk is 8 runs of `length` tokens."""
    if DENSE:
        # One offset for x, dy and dx leaves registers for more.
        x_stride_t, dy_stride_t = D, D
    BD: tl.constexpr = GROUPS * 32
    blocks, chunks_per_row = tl.cdiv(D, BD), tl.cdiv(T, 8 * length)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, first = (chunk // chunks_per_row).to(tl.int64), (chunk % chunks_per_row) * (8 * length)
    row_G = tl.arange(0, 8) * length
    d_VC = block * BD + (tl.arange(0, GROUPS) * 32)[:, None] + tl.arange(0, 32)[None, :]
    keep_VGC = (d_VC < D)[:, None, :]
    x_offset_VGC = run_offsets(row_G * x_stride_t, d_VC)
    dy_offset_VGC = run_offsets(row_G * dy_stride_t, d_VC)
    dx_offset_VGC = run_offsets(row_G * D, d_VC)
    x_ptr += b * x_stride_b * X_ALIGNMENT + first.to(tl.int64) * x_stride_t
    dy_ptr += b * dy_stride_b * DY_ALIGNMENT + first.to(tl.int64) * dy_stride_t
    dx_ptr += (b * T + first) * D
    z_ptr += b * z_stride_b
    positions_ptr += b * positions_stride_b

    d_J, r_R = block * BD + tl.arange(0, BD), tl.arange(0, 16)
    u_W = ()
    u_columns_W = ()
    for w in tl.static_range(4):
        # Of taps that are not there it is 0.
        u_RJ = load_basis(u_ptr, s_ptr, r_R, d_J, d_J < (D if w < W else 0), D, w, W, RANK, HAS_STATIC)
        if not HAS_STATIC:
            # A load of nothing, for no other use than that Triton then keeps the basis in shared memory: in registers,
            # as it would otherwise, it makes others spill.
            zero_J = tl.load(u_ptr + d_J, mask=d_J < 0, other=0.0).to(tl.float32)
            u_RJ = tl.where((r_R < RANK)[:, None], u_RJ, zero_J[None, :])
        u_RJ = u_RJ.to(DOT)
        u_W += (u_RJ,)
        u_columns_W += (basis_columns(u_RJ, GROUPS),)
    u_VKR = _basis_depth(u_W, GROUPS)

    x1 = load_token(x_ptr - x_stride_t, first - 1, row_G, x_offset_VGC, keep_VGC, T)
    x2 = load_token(x_ptr - 2 * x_stride_t, first - 2, row_G, x_offset_VGC, keep_VGC, T)
    x3 = load_token(x_ptr - 3 * x_stride_t, first - 3, row_G, x_offset_VGC, keep_VGC, T).to(tl.int16, bitcast=True)
    dx1 = tl.zeros((GROUPS, 8, 32), tl.float32)
    dx2 = tl.zeros((GROUPS, 8, 32), tl.float32)
    dx3 = tl.zeros((GROUPS, 8, 32), tl.float32)
    du = _no_basis_gradient(GROUPS, SPARING)
    dz_i = tl.arange(0, 256)
    dz_row = (dz_i // 16) % 8 * length + dz_i // 128
    dz_offset = dz_row * ROW + dz_i % 16
    dz_ptr += ((block.to(tl.int64) * B + b) * T + first) * ROW
    # What the pipeliner does not fetch ahead, narrow as it is, is fetched two steps ahead by hand. It refuses a loop
    # that passes a value on unchanged: the second step's coefficients and x3 are kept as integers.
    next_pa = load_token_positions(positions_ptr, positions_stride_t, first, row_G, T, HAS_POSITIONS)
    next_pb = load_token_positions(positions_ptr, positions_stride_t, first + 1, row_G, T, HAS_POSITIONS)
    next_z_MR = load_pair_coefficients(z_ptr, z_stride_t, first, length, T, RANK)
    later_z_MR = load_pair_coefficients(z_ptr, z_stride_t, first + 2, length, T, RANK).to(tl.int16, bitcast=True)
    for i in tl.range(0, length // 2, num_stages=STAGES):
        t = first + 2 * i
        xa = load_token(x_ptr, t, row_G, x_offset_VGC, keep_VGC, T)
        xb = load_token(x_ptr + x_stride_t, t + 1, row_G, x_offset_VGC, keep_VGC, T)
        dya = load_token(dy_ptr, t, row_G, dy_offset_VGC, keep_VGC, T)
        dyb = load_token(dy_ptr + dy_stride_t, t + 1, row_G, dy_offset_VGC, keep_VGC, T)
        pa, pb = next_pa, next_pb
        next_pa = load_token_positions(positions_ptr, positions_stride_t, t + 2, row_G, T, HAS_POSITIONS)
        next_pb = load_token_positions(positions_ptr, positions_stride_t, t + 3, row_G, T, HAS_POSITIONS)
        z_MR = next_z_MR.to(DOT)
        next_z_MR = later_z_MR.to(next_z_MR.dtype, bitcast=True)
        later_z_MR = load_pair_coefficients(z_ptr, z_stride_t, t + 4, length, T, RANK).to(tl.int16, bitcast=True)

        if DX_FIRST:
            done3, done2, dx3, dx2, dx1 = _march(
                z_MR, u_columns_W, dya, dyb, pa, pb, dx1, dx2, dx3, W, RESIDUAL, HAS_POSITIONS, GROUPS
            )
            store_token(dx_ptr - 3 * D, done3, t - 3, row_G, dx_offset_VGC, keep_VGC, i > 1, T)
            store_token(dx_ptr - 2 * D, done2, t - 2, row_G, dx_offset_VGC, keep_VGC, i > 0, T)
        ga, gb = dya.to(DOT), dyb.to(DOT)
        g0 = _filter_gradient(pa, 0, ga, xa, W, HAS_POSITIONS)
        g1 = _filter_gradient(pa, 1, ga, x1, W, HAS_POSITIONS)
        g2 = _filter_gradient(pa, 2, ga, x2, W, HAS_POSITIONS)
        g3 = _filter_gradient(pa, 3, ga, x3.to(x1.dtype, bitcast=True), W, HAS_POSITIONS)
        g4 = _filter_gradient(pb, 0, gb, xb, W, HAS_POSITIONS)
        g5 = _filter_gradient(pb, 1, gb, xa, W, HAS_POSITIONS)
        g6 = _filter_gradient(pb, 2, gb, x1, W, HAS_POSITIONS)
        g7 = _filter_gradient(pb, 3, gb, x2, W, HAS_POSITIONS)
        # (V, G, C, token of the pair, tap // 2, tap % 2)
        g02, g13 = tl.join(tl.join(g0, g4), tl.join(g2, g6)), tl.join(tl.join(g1, g5), tl.join(g3, g7))
        g = tl.join(g02, g13)
        du = _add_basis_gradient(du, g, z_MR, GROUPS, SPARING)
        g_VMK = g.reshape(GROUPS, 8, 4, 2, 2, 2, 2, 4).permute(0, 6, 1, 7, 3, 2, 4, 5).reshape(GROUPS, 16, 128)
        dz_VMR = tl.dot(g_VMK, u_VKR)
        tl.store(dz_ptr + dz_offset, _sum_groups(dz_VMR, GROUPS), mask=t + dz_row < T)
        if not DX_FIRST:
            done3, done2, dx3, dx2, dx1 = _march(
                z_MR, u_columns_W, dya, dyb, pa, pb, dx1, dx2, dx3, W, RESIDUAL, HAS_POSITIONS, GROUPS
            )
            store_token(dx_ptr - 3 * D, done3, t - 3, row_G, dx_offset_VGC, keep_VGC, i > 1, T)
            store_token(dx_ptr - 2 * D, done2, t - 2, row_G, dx_offset_VGC, keep_VGC, i > 0, T)

        x3, x2, x1 = x1.to(tl.int16, bitcast=True), xa, xb
        x_ptr += 2 * x_stride_t
        dy_ptr += 2 * dy_stride_t
        dx_ptr += 2 * D
        dz_ptr += 2 * ROW

    t = first + length
    fa = load_token(dy_ptr, t, row_G, dy_offset_VGC, keep_VGC, T).to(tl.float32)
    fb = load_token(dy_ptr + dy_stride_t, t + 1, row_G, dy_offset_VGC, keep_VGC, T).to(tl.float32)
    fc = load_token(dy_ptr + 2 * dy_stride_t, t + 2, row_G, dy_offset_VGC, keep_VGC, T).to(tl.float32)
    pa, pb = next_pa, next_pb
    pc = load_token_positions(positions_ptr, positions_stride_t, t + 2, row_G, T, HAS_POSITIONS)
    z_MR = next_z_MR.to(DOT)
    if W > 3:
        ka, kb = split_tokens(tl.dot(z_MR, u_columns_W[3]), GROUPS)
        dx3 += where_counts(pa, 3, ka * fa, HAS_POSITIONS)
        dx2 += where_counts(pb, 3, kb * fb, HAS_POSITIONS)
    if W > 2:
        ka, kb = split_tokens(tl.dot(z_MR, u_columns_W[2]), GROUPS)
        dx2 += where_counts(pa, 2, ka * fa, HAS_POSITIONS)
        dx1 += where_counts(pb, 2, kb * fb, HAS_POSITIONS)
    ka, _ = split_tokens(tl.dot(z_MR, u_columns_W[1]), GROUPS)
    dx1 += where_counts(pa, 1, ka * fa, HAS_POSITIONS)
    if W > 3:
        z_MR = later_z_MR.to(next_z_MR.dtype, bitcast=True).to(DOT)
        ka, _ = split_tokens(tl.dot(z_MR, u_columns_W[3]), GROUPS)
        dx1 += where_counts(pc, 3, ka * fc, HAS_POSITIONS)
    store_token(dx_ptr - 3 * D, dx3, t - 3, row_G, dx_offset_VGC, keep_VGC, True, T)
    store_token(dx_ptr - 2 * D, dx2, t - 2, row_G, dx_offset_VGC, keep_VGC, True, T)
    store_token(dx_ptr - D, dx1, t - 1, row_G, dx_offset_VGC, keep_VGC, True, T)

    du_RWJ = _basis_gradient(du, GROUPS, SPARING)
    w_W = tl.arange(0, 4)
    du_row = chunk.to(tl.int64) * (ROW * W) + (r_R[:, None] * W + w_W[None, :])
    mask = (r_R < RANK + HAS_STATIC)[:, None, None] & (w_W < W)[None, :, None] & (d_J < D)[None, None, :]
    tl.store(du_ptr + du_row[:, :, None] * D + d_J[None, None, :], du_RWJ, mask=mask)


def _run_length(x: torch.Tensor) -> int:
    """Tokens of a run, a power of two, so that every multiprocessor has its two programs at once."""
    batch, tokens, channels = x.shape
    work = batch * tokens * triton.cdiv(channels, _GROUPS * GROUP)
    length = triton.next_power_of_2(triton.cdiv(work, 2 * RUNS * multiprocessors(x.device)))
    return max(8, min(MOST_LENGTH, length, triton.next_power_of_2(tokens) // RUNS))


def covers(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> bool:
    """bfloat16 (float16 would overflow in the product of x and dy), the usual ranks, 2 to 4 taps, no state."""
    rank, kernel_size, _ = basis.shape
    return (
        x.dtype == torch.bfloat16
        and 1 < kernel_size <= _MOST_TAPS
        and rank + (static_filter is not None) <= RANKS
        and initial_state is None
        and aligned_rows(x)
        and fits_offsets(x, coefficients)
    )


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    gradients: tuple[torch.Tensor | None, ...],
) -> None:
    """Fills `gradients` of x, coefficients, basis and static filter, for inputs that `covers` accepts."""
    dx, dcoefficients, dbasis, dstatic = gradients
    batch, tokens, channels = x.shape
    dy_rows = rows(dy if dy.stride(1) < MOST_STRIDE else dy.contiguous())
    x_rows, position_rows = rows(x), flat_rows(positions, x)
    z_rows = rows(coefficients, wide=False)
    basis = basis.contiguous()
    rank, kernel_size, _ = basis.shape
    length = _run_length(x)
    blocks, chunks = triton.cdiv(channels, _GROUPS * GROUP), batch * triton.cdiv(tokens, RUNS * length)
    dz_partials = torch.empty(blocks, batch * tokens, ROW, dtype=torch.float32, device=x.device)
    du_partials = torch.empty(chunks, ROW, kernel_size * channels, dtype=torch.float32, device=x.device)
    with on_device(x):
        _backward_kernel[(blocks * chunks,)](
            dy_rows.tensor,
            x_rows.tensor,
            z_rows.tensor,
            basis,
            basis if static_filter is None else static_filter.contiguous(),
            position_rows.tensor,
            dx,
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
            length,
            DY_ALIGNMENT=dy_rows.alignment,
            X_ALIGNMENT=x_rows.alignment,
            DENSE=x_rows.stride_t == dy_rows.stride_t == channels,
            RANK=rank,
            W=kernel_size,
            RESIDUAL=residual,
            HAS_STATIC=static_filter is not None,
            HAS_POSITIONS=positions is not None,
            GROUPS=_GROUPS,
            # Masks need registers.
            SPARING=positions is not None,
            # Faster, but other variants would spill.
            DX_FIRST=residual and static_filter is not None and positions is None,
            ROW=ROW,
            # The interpreter has no bfloat16 product: it multiplies the bit patterns.
            DOT=tl.float32 if INTERPRETED else tl.bfloat16,
            STAGES=3,
            num_warps=_GROUPS,
        )
    sum_run_partials(dz_partials, du_partials, dcoefficients, dbasis, dstatic)
