"""The backward of low-rank dynamic convolution in Triton for bfloat16: one pass over x and dy.

The rows of a matrix-unit tile need not follow each other in time. A program owns 8 runs of consecutive tokens, and
all runs step forward together, two tokens at a time: the 16 rows of a tile are 2 tokens of each run. Each thread so
meets consecutive tokens of one run, and x some steps earlier is what it held some steps ago: no copy of x is read or
moved. Channels are numbered so that the filters come out of the matrix unit in the layout in which x and dy are
loaded; `_filters_by_tap` and its like only rename registers.

dx marches along: the filter of token t serves the gradients of tokens t to t - 3, which are sums in registers until
complete, and are written up to 3 steps late. Two further steps, over the tokens after the run, complete its last 3.

Shape suffixes: G runs, V groups of 32 channels, C channels of a group, M rows of a tile (token of the pair, run),
R ranks with the static filter.
"""

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, flat_rows, multiprocessors, on_device, rows
from .lowrank_tiles import load_basis
from .reduction import sum_partials

__all__ = ["backward", "covers"]

_RUNS, _RANKS, _KERNEL_SIZE, _GROUP = 8, 16, 4, 32
_GROUPS = 8
_SHAPE_ARGUMENTS = ["B", "T", "x_stride_b", "z_stride_b", "dy_stride_b", "positions_stride_b", "length"]


@triton.jit
def _load_pair_coefficients(z_ptr, stride_t, t, length, T, RANK: tl.constexpr):
    """The coefficients of tokens t and t + 1 of each run. The static filter's is 1; what is past T meets dy = 0."""
    m_M, r_R = tl.arange(0, 16), tl.arange(0, 16)
    # Past the end the last row stands in: cheaper than a mask for each row.
    row_M = tl.minimum(t + (m_M % 8) * length + m_M // 8, T - 1)
    return tl.load(z_ptr + (row_M[:, None] * stride_t + r_R[None, :]), mask=(r_R < RANK)[None, :], other=1.0)


@triton.jit
def _load_token(x_ptr, t, row_G, offset_GVC, keep_GVC, T):
    """Token t of each run."""
    inside_G = (t + row_G >= 0) & (t + row_G < T)
    return tl.load(x_ptr + offset_GVC, mask=inside_G[:, None, None] & keep_GVC, other=0.0)


@triton.jit
def _filters_by_tap(k_MN, GROUPS: tl.constexpr):
    """Matrix-unit tiles (token, run, tap, j, group, q, e) of channels 8q + 2j + e become a (G, V, C) tile for each
    token of the pair and tap: k0 to k3 for the first token, k4 to k7 for the second."""
    k = k_MN.reshape(2, 8, 4, 4, GROUPS, 4, 2).permute(1, 4, 5, 3, 6, 0, 2).reshape(8, GROUPS, 32, 2, 2, 2)
    even, odd = k.split()
    taps_0, taps_2 = even.split()
    taps_1, taps_3 = odd.split()
    k0, k4 = taps_0.split()
    k1, k5 = taps_1.split()
    k2, k6 = taps_2.split()
    k3, k7 = taps_3.split()
    return k0, k1, k2, k3, k4, k5, k6, k7


@triton.jit
def _where_counts(position_G, w: tl.constexpr, term_GVC, HAS_POSITIONS: tl.constexpr):
    if HAS_POSITIONS:
        term_GVC = tl.where((position_G >= w)[:, None, None], term_GVC, 0.0)
    return term_GVC


@triton.jit
def _load_position(positions_ptr, stride_t, t, row_G, T, HAS_POSITIONS: tl.constexpr):
    position_G = row_G
    if HAS_POSITIONS:
        position_G = tl.load(positions_ptr + (t + row_G).to(tl.int64) * stride_t, mask=t + row_G < T, other=-1).to(
            tl.int32
        )
    return position_G


@triton.jit
def _store_token(dx_ptr, dx_GVC, t, row_G, offset_GVC, keep_GVC, written, T):
    mask_GVC = (written & (t + row_G < T))[:, None, None] & keep_GVC
    tl.store(dx_ptr + offset_GVC, dx_GVC.to(dx_ptr.dtype.element_ty), mask=mask_GVC)


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
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    GROUPS: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz_ptr: (blocks of channels, B, T, RANK); du_ptr: (chunks, RANK + HAS_STATIC, 4, D); to be summed over their
    first dimension. A chunk is 8 runs of `length` tokens."""
    if DENSE:
        # One offset for x, dy and dx leaves registers for more.
        x_stride_t, dy_stride_t = D, D
    W: tl.constexpr = 4
    BD: tl.constexpr = GROUPS * 32
    blocks, chunks_per_row = tl.cdiv(D, BD), tl.cdiv(T, 8 * length)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, first = (chunk // chunks_per_row).to(tl.int64), (chunk % chunks_per_row) * (8 * length)
    row_G = tl.arange(0, 8) * length
    d_VC = block * BD + (tl.arange(0, GROUPS) * 32)[:, None] + tl.arange(0, 32)[None, :]
    keep_GVC = (d_VC < D)[None, :, :]
    x_offset_GVC = row_G[:, None, None] * x_stride_t + d_VC[None, :, :]
    dy_offset_GVC = row_G[:, None, None] * dy_stride_t + d_VC[None, :, :]
    dx_offset_GVC = row_G[:, None, None] * D + d_VC[None, :, :]
    x_ptr += b * x_stride_b * X_ALIGNMENT + first.to(tl.int64) * x_stride_t
    dy_ptr += b * dy_stride_b * DY_ALIGNMENT + first.to(tl.int64) * dy_stride_t
    dx_ptr += (b * T + first) * D
    z_ptr += b * z_stride_b
    positions_ptr += b * positions_stride_b

    d_J, r_R = block * BD + tl.arange(0, BD), tl.arange(0, 16)
    u_0 = load_basis(u_ptr, s_ptr, r_R, d_J, d_J < D, D, 0, W, RANK, HAS_STATIC).to(DOT)
    u_1 = load_basis(u_ptr, s_ptr, r_R, d_J, d_J < D, D, 1, W, RANK, HAS_STATIC).to(DOT)
    u_2 = load_basis(u_ptr, s_ptr, r_R, d_J, d_J < D, D, 2, W, RANK, HAS_STATIC).to(DOT)
    u_3 = load_basis(u_ptr, s_ptr, r_R, d_J, d_J < D, D, 3, W, RANK, HAS_STATIC).to(DOT)
    u = tl.join(tl.join(u_0, u_2), tl.join(u_1, u_3)).reshape(16, GROUPS, 4, 4, 2, W)
    # Columns (tap, j, group, q, e): see `_filters_by_tap`. Depth (tap, j // 2, q, j % 2, e), each group apart.
    u_RN = u.permute(0, 5, 3, 1, 2, 4).reshape(16, W * BD)
    u_VKR = u.reshape(16, GROUPS, 4, 2, 2, 2, W).permute(1, 6, 3, 2, 4, 5, 0).reshape(GROUPS, W * 32, 16)

    x1 = _load_token(x_ptr - x_stride_t, first - 1, row_G, x_offset_GVC, keep_GVC, T)
    x2 = _load_token(x_ptr - 2 * x_stride_t, first - 2, row_G, x_offset_GVC, keep_GVC, T)
    # The pipeliner refuses a loop that passes a value on unchanged, as x1 would be to x3: x3 is kept as integers.
    x3 = _load_token(x_ptr - 3 * x_stride_t, first - 3, row_G, x_offset_GVC, keep_GVC, T).to(tl.int16, bitcast=True)
    dx1 = tl.zeros((8, GROUPS, 32), tl.float32)
    dx2 = tl.zeros((8, GROUPS, 32), tl.float32)
    dx3 = tl.zeros((8, GROUPS, 32), tl.float32)
    du_RN = tl.zeros((16, W * BD), tl.float32)
    dz_i = tl.arange(0, 256)
    dz_row, dz_r = ((dz_i // 16) % 8) * length + dz_i // 128, dz_i % 16
    dz_ptr += ((block.to(tl.int64) * B + b) * T + first) * RANK
    next_z_MR = _load_pair_coefficients(z_ptr, z_stride_t, first, length, T, RANK)
    for i in tl.range(0, length // 2, num_stages=STAGES):
        t = first + 2 * i
        xa = _load_token(x_ptr, t, row_G, x_offset_GVC, keep_GVC, T)
        xb = _load_token(x_ptr + x_stride_t, t + 1, row_G, x_offset_GVC, keep_GVC, T)
        dya = _load_token(dy_ptr, t, row_G, dy_offset_GVC, keep_GVC, T)
        dyb = _load_token(dy_ptr + dy_stride_t, t + 1, row_G, dy_offset_GVC, keep_GVC, T)
        pa = _load_position(positions_ptr, positions_stride_t, t, row_G, T, HAS_POSITIONS)
        pb = _load_position(positions_ptr, positions_stride_t, t + 1, row_G, T, HAS_POSITIONS)
        z_MR = next_z_MR.to(DOT)
        next_z_MR = _load_pair_coefficients(z_ptr, z_stride_t, t + 2, length, T, RANK)

        ga, gb = dya.to(DOT), dyb.to(DOT)
        g0 = _where_counts(pa, 0, ga * xa.to(DOT), HAS_POSITIONS)
        g1 = _where_counts(pa, 1, ga * x1.to(DOT), HAS_POSITIONS)
        g2 = _where_counts(pa, 2, ga * x2.to(DOT), HAS_POSITIONS)
        g3 = _where_counts(pa, 3, ga * x3.to(x1.dtype, bitcast=True).to(DOT), HAS_POSITIONS)
        g4 = _where_counts(pb, 0, gb * xb.to(DOT), HAS_POSITIONS)
        g5 = _where_counts(pb, 1, gb * xa.to(DOT), HAS_POSITIONS)
        g6 = _where_counts(pb, 2, gb * x1.to(DOT), HAS_POSITIONS)
        g7 = _where_counts(pb, 3, gb * x2.to(DOT), HAS_POSITIONS)
        # (G, V, C, token of the pair, tap // 2, tap % 2)
        g02, g13 = tl.join(tl.join(g0, g4), tl.join(g2, g6)), tl.join(tl.join(g1, g5), tl.join(g3, g7))
        g = tl.join(g02, g13)
        g_MN = g.reshape(8, GROUPS, 4, 4, 2, 2, W).permute(5, 0, 6, 3, 1, 2, 4).reshape(16, W * BD)
        du_RN = tl.dot(tl.trans(z_MR), g_MN, du_RN)
        g_VMK = g.reshape(8, GROUPS, 4, 2, 2, 2, 2, W).permute(1, 6, 0, 7, 3, 2, 4, 5).reshape(GROUPS, 16, W * 32)
        dz_VMR = tl.dot(g_VMK, u_VKR)
        low, high = dz_VMR.reshape(2, GROUPS // 2, 256).permute(1, 2, 0).split()
        low, high = (low + high).reshape(2, GROUPS // 4, 256).permute(1, 2, 0).split()
        low, high = (low + high).reshape(2, 256).permute(1, 0).split()
        tl.store(dz_ptr + (dz_row * RANK + dz_r), low + high, mask=(t + dz_row < T) & (dz_r < RANK))
        k0, k1, k2, k3, k4, k5, k6, k7 = _filters_by_tap(tl.dot(z_MR, u_RN), GROUPS)
        fa, fb = dya.to(tl.float32), dyb.to(tl.float32)
        done3 = dx3 + _where_counts(pa, 3, k3 * fa, HAS_POSITIONS)
        done2 = dx2 + _where_counts(pa, 2, k2 * fa, HAS_POSITIONS) + _where_counts(pb, 3, k7 * fb, HAS_POSITIONS)
        dx3 = dx1 + _where_counts(pa, 1, k1 * fa, HAS_POSITIONS) + _where_counts(pb, 2, k6 * fb, HAS_POSITIONS)
        dx2 = _where_counts(pa, 0, k0 * fa, HAS_POSITIONS) + _where_counts(pb, 1, k5 * fb, HAS_POSITIONS)
        dx1 = _where_counts(pb, 0, k4 * fb, HAS_POSITIONS)
        if RESIDUAL:
            dx2 += fa
            dx1 += fb
        _store_token(dx_ptr - 3 * D, done3, t - 3, row_G, dx_offset_GVC, keep_GVC, i > 1, T)
        _store_token(dx_ptr - 2 * D, done2, t - 2, row_G, dx_offset_GVC, keep_GVC, i > 0, T)

        x3, x2, x1 = x1.to(tl.int16, bitcast=True), xa, xb
        x_ptr += 2 * x_stride_t
        dy_ptr += 2 * dy_stride_t
        dx_ptr += 2 * D
        dz_ptr += 2 * RANK

    t = first + length
    fa = _load_token(dy_ptr, t, row_G, dy_offset_GVC, keep_GVC, T).to(tl.float32)
    fb = _load_token(dy_ptr + dy_stride_t, t + 1, row_G, dy_offset_GVC, keep_GVC, T).to(tl.float32)
    fc = _load_token(dy_ptr + 2 * dy_stride_t, t + 2, row_G, dy_offset_GVC, keep_GVC, T).to(tl.float32)
    pa = _load_position(positions_ptr, positions_stride_t, t, row_G, T, HAS_POSITIONS)
    pb = _load_position(positions_ptr, positions_stride_t, t + 1, row_G, T, HAS_POSITIONS)
    pc = _load_position(positions_ptr, positions_stride_t, t + 2, row_G, T, HAS_POSITIONS)
    _, k1, k2, k3, _, _, k6, k7 = _filters_by_tap(tl.dot(next_z_MR.to(DOT), u_RN), GROUPS)
    dx3 += _where_counts(pa, 3, k3 * fa, HAS_POSITIONS)
    dx2 += _where_counts(pa, 2, k2 * fa, HAS_POSITIONS) + _where_counts(pb, 3, k7 * fb, HAS_POSITIONS)
    dx1 += _where_counts(pa, 1, k1 * fa, HAS_POSITIONS) + _where_counts(pb, 2, k6 * fb, HAS_POSITIONS)
    z_MR = _load_pair_coefficients(z_ptr, z_stride_t, t + 2, length, T, RANK).to(DOT)
    _, _, _, k3, _, _, _, _ = _filters_by_tap(tl.dot(z_MR, u_RN), GROUPS)
    dx1 += _where_counts(pc, 3, k3 * fc, HAS_POSITIONS)
    _store_token(dx_ptr - 3 * D, dx3, t - 3, row_G, dx_offset_GVC, keep_GVC, True, T)
    _store_token(dx_ptr - 2 * D, dx2, t - 2, row_G, dx_offset_GVC, keep_GVC, True, T)
    _store_token(dx_ptr - D, dx1, t - 1, row_G, dx_offset_GVC, keep_GVC, True, T)

    du_RWJ = du_RN.reshape(16, W, 4, GROUPS, 4, 2).permute(0, 1, 3, 4, 2, 5).reshape(16, W, BD)
    w_W = tl.arange(0, W)
    du_row = chunk.to(tl.int64) * ((RANK + HAS_STATIC) * W) + (r_R[:, None] * W + w_W[None, :])
    mask = (r_R < RANK + HAS_STATIC)[:, None, None] & (d_J < D)[None, None, :]
    tl.store(du_ptr + du_row[:, :, None] * D + d_J[None, None, :], du_RWJ, mask=mask)


def _run_length(x: torch.Tensor) -> int:
    """Tokens of a run, so that about every multiprocessor has one program; a power of two."""
    batch, tokens, channels = x.shape
    work = batch * tokens * triton.cdiv(channels, _GROUPS * _GROUP)
    length = triton.next_power_of_2(triton.cdiv(work, _RUNS * multiprocessors(x.device)))
    return max(8, min(256, length, triton.next_power_of_2(tokens) // _RUNS))


def covers(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> bool:
    """bfloat16 (float16 would overflow in the product of x and dy), the usual kernel size and rank, no state."""
    rank, kernel_size, _ = basis.shape
    return (
        x.dtype == torch.bfloat16
        and kernel_size == _KERNEL_SIZE
        and rank + (static_filter is not None) <= _RANKS
        and initial_state is None
        # Short rows would leave runs empty and make a partial sum for each.
        and x.shape[1] >= 256
        # The kernel finds coefficients by 32-bit offsets.
        and x.shape[1] * max(coefficients.stride(1), rank) < 2**31
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
    dy_rows, x_rows, position_rows = rows(dy), rows(x), flat_rows(positions, x)
    z_rows = rows(coefficients, wide=False)
    basis = basis.contiguous()
    rank = basis.shape[0]
    length = _run_length(x)
    blocks, chunks = triton.cdiv(channels, _GROUPS * _GROUP), batch * triton.cdiv(tokens, _RUNS * length)
    ranks = rank + (static_filter is not None)
    dz_partials = torch.empty(blocks, coefficients.numel(), dtype=torch.float32, device=x.device)
    du_partials = torch.empty(chunks, ranks * _KERNEL_SIZE * channels, dtype=torch.float32, device=x.device)
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
            RESIDUAL=residual,
            HAS_STATIC=static_filter is not None,
            HAS_POSITIONS=positions is not None,
            GROUPS=_GROUPS,
            # The interpreter has no bfloat16 product: it multiplies the bit patterns.
            DOT=tl.float32 if INTERPRETED else tl.bfloat16,
            # With positions, a third stage's addresses would spill.
            STAGES=3 if positions is None else 2,
            num_warps=_GROUPS,
        )
    sum_partials(dz_partials, dcoefficients)
    sum_partials(du_partials, dbasis, dstatic)
