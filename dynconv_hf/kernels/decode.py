"""One token of the low-rank convolution for each sequence, in one launch, in Triton.

For a group of up to three tensors made from the same hidden state (queries, keys and values): their filters, the
convolutions, the shift of their states in place, and RoPE.

Between two tokens there is little to compute and everything to wait for, so a program asks for all it needs at once,
and makes the coefficients of its tensor by itself: reading them from another launch would take longer.

Shape suffixes: W taps, I tokens (each of a sequence of its own), R a block of ranks, J channels, C chunks of the
hidden state, K their elements. Sizes of tiles are powers of two.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .decode_ops import MAX_GROUP
from .launch import INTERPRETED, on_device

__all__ = ["decode_step"]

_RANK_BLOCK = 16
# Slots, of two channels each, that a program has.
_SLOTS = 32
_WARPS = 8


@triton.jit
def _one_token_coefficients(
    h_ptr,
    f_ptr,
    r_R,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    BK: tl.constexpr,
):
    """z (1, R), float32: a sum over lanes, at its end.

    A tile of BK columns is what the program's threads read at a time; CHUNKS of them are on their way together.
    """
    k_K = tl.arange(0, BK)
    sum_RK = tl.zeros((r_R.shape[0], BK), tl.float32)
    for start in range(0, HIDDEN, CHUNKS * BK):
        tiles = ()
        for c in tl.static_range(CHUNKS):
            column_K = start + c * BK + k_K
            keep_RK = (r_R < RANK)[:, None]
            if HIDDEN % (CHUNKS * BK) > 0:
                keep_RK = keep_RK & (column_K < HIDDEN)[None, :]
                h_K = tl.load(h_ptr + column_K, mask=column_K < HIDDEN, other=0.0)
            else:
                h_K = tl.load(h_ptr + column_K)
            f_RK = tl.load(f_ptr + (r_R[:, None] * HIDDEN + column_K[None, :]), mask=keep_RK, other=0.0)
            tiles += ((f_RK, h_K),)
        # Keeps the compiler from asking for a part only when another has come, to save registers.
        tl.debug_barrier()
        for c in tl.static_range(CHUNKS):
            f_RK, h_K = tiles[c]
            sum_RK += f_RK.to(tl.float32) * h_K[None, :].to(f_RK.dtype).to(tl.float32)
    return tl.sum(sum_RK, 1)[None, :]


@triton.jit
def _tile_coefficients(
    h_ptr,
    h_stride_b,
    f_ptr,
    i_I,
    keep_I,
    r_R,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """z (I, R), float32: a product for each chunk, so that each warp has its own, summed at the end."""
    c_C, k_K = tl.arange(0, CHUNKS), tl.arange(0, BK)
    z_CIR = tl.zeros((CHUNKS, i_I.shape[0], r_R.shape[0]), tl.float32)
    for k in tl.range(0, HIDDEN, CHUNKS * BK, num_stages=STAGES):
        k_CK = k + c_C[:, None] * BK + k_K[None, :]
        keep_CK = k_CK < HIDDEN
        f_CRK = tl.load(
            f_ptr + (r_R[None, :, None] * HIDDEN + k_CK[:, None, :]),
            mask=(r_R < RANK)[None, :, None] & keep_CK[:, None, :],
            other=0.0,
        )
        h_CIK = tl.load(
            h_ptr + (i_I[None, :, None] * h_stride_b + k_CK[:, None, :]),
            mask=keep_I[None, :, None] & keep_CK[:, None, :],
            other=0.0,
        ).to(f_ptr.dtype.element_ty)
        z_CIR = tl.dot(h_CIK.to(DOT), tl.permute(f_CRK, 0, 2, 1).to(DOT), z_CIR, input_precision="ieee")
    return tl.sum(z_CIR, 0)


@triton.jit
def _channels(block, BJ: tl.constexpr, HEAD_HALF: tl.constexpr, ROTARY_HALF: tl.constexpr):
    """The two channels of each of a block's slots, and the slot's place in its head.

    RoPE turns the two together; past RoPE's part of a head, the rest is taken in pairs.
    """
    if HEAD_HALF % BJ == 0:
        # Blocks within a head: no division for each channel, and wide loads.
        blocks: tl.constexpr = HEAD_HALF // BJ
        head, j_J = block // blocks * (2 * HEAD_HALF), block % blocks * BJ + tl.arange(0, BJ)
    else:
        slot_J = block * BJ + tl.arange(0, BJ)
        head, j_J = slot_J // HEAD_HALF * (2 * HEAD_HALF), slot_J % HEAD_HALF
    if ROTARY_HALF == HEAD_HALF:
        return head + j_J, head + j_J + HEAD_HALF, j_J
    left_J = head + tl.where(j_J < ROTARY_HALF, j_J, j_J + ROTARY_HALF)
    return left_J, left_J + tl.where(j_J < ROTARY_HALF, ROTARY_HALF, HEAD_HALF - ROTARY_HALF), j_J


@triton.jit
def _load_state(state_ptr, w_W, b_I, d_J, keep_IJ, D, W: tl.constexpr):
    """The input w tokens back, (W, I, J), but for w = 0."""
    return tl.load(
        state_ptr + ((b_I[:, None] * D + d_J[None, :]) * (W - 1))[None, :, :] + (W - 1 - w_W)[:, None, None],
        mask=((w_W > 0) & (w_W < W))[:, None, None] & keep_IJ[None, :, :],
        other=0.0,
    )


@triton.jit
def _history(x_IJ, state_WIJ, w_W):
    """The input w tokens back, (W, I, J)."""
    return tl.where((w_W == 0)[:, None, None], x_IJ[None, :, :], state_WIJ)


@triton.jit
def _store_state(state_ptr, history_WIJ, w_W, b_I, d_J, keep_IJ, D, W: tl.constexpr):
    """The state of the next token: this one has become one step older."""
    tl.store(
        state_ptr + ((b_I[:, None] * D + d_J[None, :]) * (W - 1))[None, :, :] + (W - 2 - w_W)[:, None, None],
        history_WIJ.to(state_ptr.dtype.element_ty),
        mask=(w_W < W - 1)[:, None, None] & keep_IJ[None, :, :],
    )


@triton.jit
def _load_basis(u_ptr, w_W, r_R, d_J, keep_J, D, RANK: tl.constexpr, W: tl.constexpr):
    return tl.load(
        u_ptr + ((r_R[None, :] * W + w_W[:, None]) * D)[:, :, None] + d_J[None, None, :],
        mask=((r_R < RANK)[None, :] & (w_W < W)[:, None])[:, :, None] & keep_J[None, None, :],
        other=0.0,
    )


@triton.jit
def _load_static(s_ptr, w_W, d_J, keep_J, D, W: tl.constexpr, HAS_STATIC: tl.constexpr):
    if HAS_STATIC:
        keep_WJ = (w_W < W)[:, None] & keep_J[None, :]
        return tl.load(s_ptr + w_W[:, None] * D + d_J[None, :], mask=keep_WJ, other=0.0).to(tl.float32)
    return tl.zeros((w_W.shape[0], d_J.shape[0]), tl.float32)


@triton.jit
def _filtered(z_IR, u_WRJ, s_WJ, history_WIJ, counts_WI, BI: tl.constexpr, DOT: tl.constexpr):
    """The sum over taps of what these ranks and `s` make of the history: (I, J), float32."""
    if BI == 1:
        # Filters are not summed over ranks before they are used: one sum over lanes serves ranks and taps.
        first_R = tl.arange(0, z_IR.shape[1]) == 0
        k_WRJ = tl.trans(z_IR)[None, :, :] * u_WRJ.to(tl.float32)
        k_WRJ += tl.where(first_R[None, :, None], s_WJ[:, None, :], 0.0)
        term_WRJ = tl.where(counts_WI[:, :, None], k_WRJ * history_WIJ.to(tl.float32), 0.0)
        term_VJ = tl.reshape(term_WRJ, (u_WRJ.shape[0] * u_WRJ.shape[1], u_WRJ.shape[2]))
        return tl.sum(term_VJ, 0)[None, :]
    taps: tl.constexpr = u_WRJ.shape[0]
    s_WIJ = tl.broadcast_to(s_WJ[:, None, :], (taps, BI, u_WRJ.shape[2]))
    z_WIR = tl.broadcast_to(z_IR.to(DOT)[None, :, :], (taps, BI, u_WRJ.shape[1]))
    k_WIJ = tl.dot(z_WIR, u_WRJ.to(DOT), s_WIJ, input_precision="ieee")
    # `where`, not a product with the mask: what a token must not see may be inf or nan.
    return tl.sum(tl.where(counts_WI[:, :, None], k_WIJ * history_WIJ.to(tl.float32), 0.0), 0)


@triton.jit
def _turn(y_IJ, partner_IJ, cos_IJ, sin_IJ):
    """RoPE, rounded after every step as PyTorch rounds it."""
    dtype: tl.constexpr = y_IJ.dtype
    kept_IJ = (y_IJ.to(tl.float32) * cos_IJ.to(tl.float32)).to(dtype)
    turned_IJ = (partner_IJ * sin_IJ.to(tl.float32)).to(dtype)
    return (kept_IJ.to(tl.float32) + turned_IJ.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["B", "positions_stride", "rope_stride", "first_end", "second_end"])
def _decode_kernel(
    h_ptr,
    x0_ptr,
    x1_ptr,
    x2_ptr,
    f0_ptr,
    f1_ptr,
    f2_ptr,
    u0_ptr,
    u1_ptr,
    u2_ptr,
    s0_ptr,
    s1_ptr,
    s2_ptr,
    state0_ptr,
    state1_ptr,
    state2_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    B,
    D0,
    D1,
    D2,
    positions_stride,
    rope_stride,
    first_end,
    second_end,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ROTATED: tl.constexpr,
    HEAD_HALF: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    TAPS: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    CHUNKS: tl.constexpr,
    BK: tl.constexpr,
    PROJECTION_DOT: tl.constexpr,
    FILTER_DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of tokens by a block of one tensor's channels: those in slots of two, `_channels` says which.

    The blocks of the first tensor end at program `first_end`, those of the second at `second_end`. ROTATED has bit g
    set where RoPE turns tensor g. TAPS is the power of two that holds W.
    """
    program = tl.program_id(0)
    in_first, in_second = program < first_end, program < second_end
    x_ptr = tl.where(in_first, x0_ptr, tl.where(in_second, x1_ptr, x2_ptr))
    f_ptr = tl.where(in_first, f0_ptr, tl.where(in_second, f1_ptr, f2_ptr))
    u_ptr = tl.where(in_first, u0_ptr, tl.where(in_second, u1_ptr, u2_ptr))
    s_ptr = tl.where(in_first, s0_ptr, tl.where(in_second, s1_ptr, s2_ptr))
    state_ptr = tl.where(in_first, state0_ptr, tl.where(in_second, state1_ptr, state2_ptr))
    y_ptr = tl.where(in_first, y0_ptr, tl.where(in_second, y1_ptr, y2_ptr))
    D = tl.where(in_first, D0, tl.where(in_second, D1, D2))
    block = program - tl.where(in_first, 0, tl.where(in_second, first_end, second_end))

    left_J, right_J, j_J = _channels(block, BJ, HEAD_HALF, ROTARY_HALF)
    row_I = tl.program_id(1) * BI + tl.arange(0, BI)
    keep_I = row_I < B
    b_I = row_I.to(tl.int64)
    if WHOLE_BLOCKS:
        keep_left_J, keep_right_J = tl.full((BJ,), True, tl.int1), tl.full((BJ,), True, tl.int1)
    else:
        keep_left_J, keep_right_J = left_J < D, right_J < D
    keep_left_IJ = keep_I[:, None] & keep_left_J[None, :]
    keep_right_IJ = keep_I[:, None] & keep_right_J[None, :]
    w_W = tl.arange(0, TAPS)

    x_left_IJ = tl.load(x_ptr + (b_I[:, None] * D + left_J[None, :]), mask=keep_left_IJ, other=0.0)
    x_right_IJ = tl.load(x_ptr + (b_I[:, None] * D + right_J[None, :]), mask=keep_right_IJ, other=0.0)
    state_left_WIJ = _load_state(state_ptr, w_W, b_I, left_J, keep_left_IJ, D, W)
    state_right_WIJ = _load_state(state_ptr, w_W, b_I, right_J, keep_right_IJ, D, W)
    counts_WI = (w_W < W)[:, None] & keep_I[None, :]
    if HAS_POSITIONS:
        position_I = tl.load(positions_ptr + b_I * positions_stride, mask=keep_I, other=-1)
        counts_WI &= position_I[None, :] >= w_W[:, None]
    s_left_WJ = _load_static(s_ptr, w_W, left_J, keep_left_J, D, W, HAS_STATIC)
    s_right_WJ = _load_static(s_ptr, w_W, right_J, keep_right_J, D, W, HAS_STATIC)
    if ROTATED:
        rotates = tl.where(in_first, ROTATED & 1, tl.where(in_second, ROTATED & 2, ROTATED & 4))
        turns_IJ = keep_left_IJ & (j_J < tl.where(rotates > 0, ROTARY_HALF, 0))[None, :]
        rope_IJ = b_I[:, None] * rope_stride + j_J[None, :]
        cos_left_IJ = tl.load(cos_ptr + rope_IJ, mask=turns_IJ, other=0.0)
        sin_left_IJ = tl.load(sin_ptr + rope_IJ, mask=turns_IJ, other=0.0)
        cos_right_IJ = tl.load(cos_ptr + rope_IJ + ROTARY_HALF, mask=turns_IJ, other=0.0)
        sin_right_IJ = tl.load(sin_ptr + rope_IJ + ROTARY_HALF, mask=turns_IJ, other=0.0)

    left_IJ = tl.zeros((BI, BJ), tl.float32)
    right_IJ = tl.zeros((BI, BJ), tl.float32)
    for r in range(0, RANK, BR):
        r_R = r + tl.arange(0, BR)
        u_left_WRJ = _load_basis(u_ptr, w_W, r_R, left_J, keep_left_J, D, RANK, W)
        u_right_WRJ = _load_basis(u_ptr, w_W, r_R, right_J, keep_right_J, D, RANK, W)
        if BI == 1:
            z_IR = _one_token_coefficients(
                h_ptr + tl.program_id(1).to(tl.int64) * HIDDEN, f_ptr, r_R, RANK, HIDDEN, CHUNKS, BK
            )
        else:
            z_IR = _tile_coefficients(
                h_ptr, HIDDEN, f_ptr, b_I, keep_I, r_R, RANK, HIDDEN, CHUNKS, BK, PROJECTION_DOT, STAGES
            )
        left_WIJ = _history(x_left_IJ, state_left_WIJ, w_W)
        right_WIJ = _history(x_right_IJ, state_right_WIJ, w_W)
        z_IR = z_IR.to(f_ptr.dtype.element_ty).to(tl.float32)
        left_IJ += _filtered(z_IR, u_left_WRJ, s_left_WJ, left_WIJ, counts_WI, BI, FILTER_DOT)
        right_IJ += _filtered(z_IR, u_right_WRJ, s_right_WJ, right_WIJ, counts_WI, BI, FILTER_DOT)
        s_left_WJ, s_right_WJ = tl.zeros_like(s_left_WJ), tl.zeros_like(s_right_WJ)
    if RESIDUAL:
        left_IJ += x_left_IJ.to(tl.float32)
        right_IJ += x_right_IJ.to(tl.float32)
    left_IJ, right_IJ = left_IJ.to(x_ptr.dtype.element_ty), right_IJ.to(x_ptr.dtype.element_ty)
    if ROTATED:
        turned_left_IJ = _turn(left_IJ, -right_IJ.to(tl.float32), cos_left_IJ, sin_left_IJ)
        turned_right_IJ = _turn(right_IJ, left_IJ.to(tl.float32), cos_right_IJ, sin_right_IJ)
        left_IJ = tl.where(turns_IJ, turned_left_IJ, left_IJ)
        right_IJ = tl.where(turns_IJ, turned_right_IJ, right_IJ)
    tl.store(y_ptr + (b_I[:, None] * D + left_J[None, :]), left_IJ, mask=keep_left_IJ)
    tl.store(y_ptr + (b_I[:, None] * D + right_J[None, :]), right_IJ, mask=keep_right_IJ)
    if W > 1:
        # Every thread has read the old state before any writes the new one.
        tl.debug_barrier()
        left_WIJ = _history(x_left_IJ, state_left_WIJ, w_W)
        right_WIJ = _history(x_right_IJ, state_right_WIJ, w_W)
        _store_state(state_ptr, left_WIJ, w_W, b_I, left_J, keep_left_IJ, D, W)
        _store_state(state_ptr, right_WIJ, w_W, b_I, right_J, keep_right_IJ, D, W)


def _dot_type(*dtypes: torch.dtype) -> tl.dtype:
    """What the matrix units take without losing a digit; float32, which they do not take, is multiplied as it is."""
    if len(set(dtypes)) > 1 or dtypes[0] == torch.float32 or INTERPRETED:
        # The interpreter has no bfloat16 product: it multiplies the bit patterns.
        return tl.float32
    return tl.bfloat16 if dtypes[0] == torch.bfloat16 else tl.float16


def _block_sizes(batch: int, hidden: int, filter_size: int, head_half: int) -> dict[str, int]:
    """Few classes of batch sizes, so that a new one rarely compiles a kernel."""
    # Half as many slots where a block then stays within a head.
    slots = _SLOTS if head_half % _SLOTS == 0 or head_half % (_SLOTS // 2) else _SLOTS // 2
    common = {"BJ": slots, "STAGES": 4, "num_warps": _WARPS}
    if batch == 1:
        # 16 bytes for each thread.
        columns = _WARPS * 32 * 16 // (_RANK_BLOCK * filter_size)
        chunks = min(16, triton.next_power_of_2(triton.cdiv(hidden, columns)))
        return {"BI": 1, "CHUNKS": chunks, "BK": columns, **common}
    return {"BI": 16, "CHUNKS": _WARPS, "BK": 64 if filter_size == 2 else 16, **common}


def decode_step(
    hidden_states: torch.Tensor,
    xs: Sequence[torch.Tensor],
    filter_weights: Sequence[torch.Tensor],
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    positions: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    head_dim: int,
    rotated: Sequence[bool],
    residual: bool,
) -> list[torch.Tensor]:
    """The group's outputs, each of its x's shape, contiguous; the states are shifted in place. See `decode_ops`."""
    ys = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    hidden = hidden_states.shape[-1]
    batch = hidden_states.numel() // hidden
    if batch == 0:
        return ys
    rank, kernel_size, _ = bases[0].shape
    head_half = _SLOTS if cos is None else head_dim // 2
    sizes = _block_sizes(batch, hidden, filter_weights[0].element_size(), head_half)
    slots = sizes["BJ"]
    ends = [0]
    for x in xs:
        pairs = triton.cdiv(x.shape[-1], 2 * head_half) * head_half
        ends.append(ends[-1] + triton.cdiv(pairs, slots))
    ends += [ends[-1]] * (MAX_GROUP - len(xs))

    def each(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Slots that are not used hold a stand-in that the kernel does not read."""
        tensors = [tensor.contiguous() for tensor in tensors] or [xs[0]]
        return [*tensors, *[tensors[0]] * (MAX_GROUP - len(tensors))]

    with on_device(xs[0]):
        _decode_kernel[(ends[-1], triton.cdiv(batch, sizes["BI"]))](
            hidden_states.contiguous(),
            *each(xs),
            *each(filter_weights),
            *each(bases),
            *each(static_filters),
            *each(states),
            *each(ys),
            xs[0] if positions is None else positions,
            xs[0] if cos is None else cos.contiguous(),
            xs[0] if sin is None else sin.contiguous(),
            batch,
            *(tensor.shape[-1] for tensor in each(xs)),
            0 if positions is None or positions.shape[0] == 1 else positions.stride(0),
            0 if cos is None or cos.shape[0] == 1 else cos.shape[-1],
            ends[1],
            ends[2],
            HIDDEN=hidden,
            RANK=rank,
            W=kernel_size,
            RESIDUAL=residual,
            HAS_STATIC=len(static_filters) > 0,
            HAS_POSITIONS=positions is not None,
            ROTATED=0 if cos is None else sum(turns << g for g, turns in enumerate(rotated)),
            HEAD_HALF=head_half,
            ROTARY_HALF=head_half if cos is None else cos.shape[-1] // 2,
            WHOLE_BLOCKS=all(x.shape[-1] % (2 * head_half) == 0 and x.shape[-1] // 2 % slots == 0 for x in xs),
            TAPS=triton.next_power_of_2(kernel_size),
            BR=_RANK_BLOCK,
            PROJECTION_DOT=_dot_type(filter_weights[0].dtype),
            FILTER_DOT=_dot_type(filter_weights[0].dtype, bases[0].dtype),
            **sizes,
        )
    return ys
