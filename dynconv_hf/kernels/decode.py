"""One token of the low-rank convolution for each sequence, in one launch, in Triton.

For a group of up to three tensors made from the same hidden state (queries, keys and values): their filters, the
convolutions, the shift of their states in place, and RoPE.

Between two tokens there is little to compute and everything to wait for, so a program asks for all it needs at once,
and makes the coefficients of its tensor by itself: reading them from another launch would take longer.

Products and sums are fused where `tl.fma` says so, and nowhere else: RoPE is to round as PyTorch does.

Shape suffixes: I tokens (each of a sequence of its own), R a block of ranks, C channels, J half of them, N parts of
the hidden state, K their elements.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .decode_ops import MAX_GROUP
from .launch import INTERPRETED, on_device

__all__ = ["decode_step"]

_RANK_BLOCK = 16
# Pairs of channels that a program has.
_PAIRS = 32
_WARPS = 8
# Of a tile of tokens, where registers allow: there is more than one program for each processor, and so they run side
# by side.
_TILE_WARPS = 4


@triton.jit
def _one_token_coefficients(
    h_ptr,
    f_ptr,
    r_R,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    BK: tl.constexpr,
):
    """z (R,), float32. A part is what the program reads at a time; PARTS of them are on their way together."""
    k_K = tl.arange(0, BK)
    sum_RK = tl.zeros((r_R.shape[0], BK), tl.float32)
    for start in range(0, HIDDEN, PARTS * BK):
        parts = ()
        for n in tl.static_range(PARTS):
            column_K = start + n * BK + k_K
            keep_RK = (r_R < RANK)[:, None]
            if HIDDEN % (PARTS * BK) > 0:
                keep_RK = keep_RK & (column_K < HIDDEN)[None, :]
                h_K = tl.load(h_ptr + column_K, mask=column_K < HIDDEN, other=0.0)
            else:
                h_K = tl.load(h_ptr + column_K)
            f_RK = tl.load(f_ptr + (r_R[:, None] * HIDDEN + column_K[None, :]), mask=keep_RK, other=0.0)
            parts += ((f_RK, h_K),)
        for n in tl.static_range(PARTS):
            f_RK, h_K = parts[n]
            h_RK = tl.broadcast_to(h_K.to(f_RK.dtype)[None, :], f_RK.shape)
            sum_RK = tl.fma(f_RK.to(tl.float32), h_RK.to(tl.float32), sum_RK)
    return tl.sum(sum_RK, 1)


@triton.jit
def _tile_coefficients(
    h_ptr,
    f_ptr,
    i_I,
    keep_I,
    r_R,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """z (I, R), float32: a matrix product for each part, so that each warp has its own, summed at the end."""
    n_N, k_K = tl.arange(0, PARTS), tl.arange(0, BK)
    z_NIR = tl.zeros((PARTS, i_I.shape[0], r_R.shape[0]), tl.float32)
    for start in tl.range(0, HIDDEN, PARTS * BK, num_stages=STAGES):
        column_NK = start + n_N[:, None] * BK + k_K[None, :]
        keep_NRK, keep_NIK = (r_R < RANK)[None, :, None], keep_I[None, :, None]
        if HIDDEN % (PARTS * BK) > 0:
            keep_NRK = keep_NRK & (column_NK < HIDDEN)[:, None, :]
            keep_NIK = keep_NIK & (column_NK < HIDDEN)[:, None, :]
        f_NRK = tl.load(f_ptr + (r_R[None, :, None] * HIDDEN + column_NK[:, None, :]), mask=keep_NRK, other=0.0)
        h_NIK = tl.load(h_ptr + (i_I[None, :, None] * HIDDEN + column_NK[:, None, :]), mask=keep_NIK, other=0.0)
        h_NIK = h_NIK.to(f_ptr.dtype.element_ty).to(DOT)
        z_NIR = tl.dot(h_NIK, tl.permute(f_NRK, 0, 2, 1).to(DOT), z_NIR, input_precision="ieee")
    return tl.sum(z_NIR, 0)


@triton.jit
def _channels(block, c_C, BJ: tl.constexpr, HEAD_HALF: tl.constexpr, ROTARY_HALF: tl.constexpr):
    """The channels at places c_C of a block of BJ pairs: the first ones of the pairs, then the second ones.

    RoPE turns the two of a pair together; what is past RoPE's part of a head is paired in the same way.
    """
    if HEAD_HALF % BJ == 0:
        # Blocks within a head: no division for each channel, and wide loads.
        blocks: tl.constexpr = HEAD_HALF // BJ
        head, first = block // blocks * (2 * HEAD_HALF), block % blocks * BJ
        j_C = first + c_C % BJ
    else:
        pair_C = block * BJ + c_C % BJ
        head, j_C = pair_C // HEAD_HALF * (2 * HEAD_HALF), pair_C % HEAD_HALF
    second_C = c_C // BJ
    if ROTARY_HALF == HEAD_HALF:
        return head + j_C + second_C * HEAD_HALF
    past_C = j_C >= ROTARY_HALF
    j_C += tl.where(past_C, ROTARY_HALF, 0)
    return head + j_C + second_C * tl.where(past_C, HEAD_HALF - ROTARY_HALF, ROTARY_HALF)


@triton.jit
def _halves(x_IC, BJ: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x_IC, (x_IC.shape[0], 2, BJ)), 0, 2, 1))


@triton.jit
def _history(x_IC, states, keep_E):
    """What tap w sees, for each w.

    Zeros are put in here and not by the loads: a tile that is ready changes its layout where it was loaded, and the
    program would wait for it there, before it has asked for the rest.
    """
    history = (x_IC,)
    for w in tl.static_range(len(states)):
        history += (tl.reshape(tl.where(keep_E, states[w], 0.0), x_IC.shape),)
    return history


@triton.jit
def _turn(x_IJ, partner_IJ, cos_IJ, sin_IJ):
    """RoPE, rounded after every step as PyTorch rounds it."""
    dtype: tl.constexpr = x_IJ.dtype
    kept_IJ = (x_IJ.to(tl.float32) * cos_IJ.to(tl.float32)).to(dtype)
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
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    PARTS: tl.constexpr,
    BK: tl.constexpr,
    PROJECTION_DOT: tl.constexpr,
    FILTER_DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A token, or a tile of tokens, by a block of one tensor's channels; `_channels` says which.

    The blocks of the first tensor end at program `first_end`, those of the second at `second_end`. ROTATED has bit g
    set where RoPE turns tensor g.
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

    d_C = _channels(block, tl.arange(0, 2 * BJ), BJ, HEAD_HALF, ROTARY_HALF)
    # In 64 bits as far as the tile, in 32 within it.
    b = tl.program_id(1).to(tl.int64) * BI
    x_ptr += b * D
    y_ptr += b * D
    state_ptr += b * D * (W - 1)
    h_ptr += b * HIDDEN
    i_I, tokens = tl.arange(0, BI), (B - b).to(tl.int32)
    # A mask that is known to be full costs nothing.
    keep_I = tl.full((BI,), True, tl.int1) if BI == 1 else i_I < tokens
    keep_C = tl.full((2 * BJ,), True, tl.int1) if WHOLE_BLOCKS else d_C < D
    keep_IC = keep_I[:, None] & keep_C[None, :]

    # Everything is asked for before anything is waited for.
    x_IC = tl.load(x_ptr + (i_I[:, None] * D + d_C[None, :]), mask=keep_IC, other=0.0)
    # In one dimension: of two without a contiguous one, Triton may let neighbouring threads read different sequences.
    e_E = tl.arange(0, BI * 2 * BJ)
    d_E = _channels(block, e_E % (2 * BJ), BJ, HEAD_HALF, ROTARY_HALF)
    i_E = e_E // (2 * BJ)
    keep_E = tl.full((BI * 2 * BJ,), True, tl.int1) if BI == 1 else i_E < tokens
    keep_E = keep_E if WHOLE_BLOCKS else keep_E & (d_E < D)
    state_E_ptr = state_ptr + (i_E * D + d_E) * (W - 1)
    states = ()
    for w in tl.static_range(1, W):
        states += (tl.load(state_E_ptr + (W - 1 - w), mask=keep_E),)
    if HAS_POSITIONS:
        position_I = tl.load(positions_ptr + (b + i_I) * positions_stride, mask=keep_I, other=-1)
    else:
        position_I = tl.full((BI,), W, tl.int32)
    if HAS_STATIC:
        statics = ()
        for w in tl.static_range(W):
            statics += (tl.load(s_ptr + w * D + d_C, mask=keep_C, other=0.0),)
    if ROTATED:
        rotates = tl.where(in_first, ROTATED & 1, tl.where(in_second, ROTATED & 2, ROTATED & 4))
        j_J = (block * BJ + tl.arange(0, BJ)) % HEAD_HALF
        turns_IJ = keep_I[:, None] & (j_J < tl.where(rotates > 0, ROTARY_HALF, 0))[None, :]
        cos_ptr += b * rope_stride
        sin_ptr += b * rope_stride
        rope_IJ = i_I[:, None] * rope_stride + j_J[None, :]
        # The second halves repeat the first.
        cos_IJ = tl.load(cos_ptr + rope_IJ, mask=turns_IJ, other=0.0)
        sin_IJ = tl.load(sin_ptr + rope_IJ, mask=turns_IJ, other=0.0)

    y_IC = tl.zeros((BI, 2 * BJ), tl.float32)
    for r in tl.range(0, RANK, BR, num_stages=1, loop_unroll_factor=1):
        r_R = r + tl.arange(0, BR)
        bases = ()
        for w in tl.static_range(W):
            u_ptr_RC = u_ptr + ((r_R * W + w) * D)[:, None] + d_C[None, :]
            bases += (tl.load(u_ptr_RC, mask=(r_R < RANK)[:, None] & keep_C[None, :]),)
        if BI == 1:
            z_R = _one_token_coefficients(h_ptr, f_ptr, r_R, RANK, HIDDEN, PARTS, BK)
            z_R = z_R.to(f_ptr.dtype.element_ty).to(tl.float32)
            history = _history(x_IC, states, keep_E)
            # Taps before ranks: what is summed over taps waits for no coefficients.
            tapped_RC = tl.zeros((BR, 2 * BJ), tl.float32)
            for w in tl.static_range(W):
                history_RC = tl.broadcast_to(history[w].to(tl.float32), tapped_RC.shape)
                u_RC = tl.where((r_R < RANK)[:, None] & keep_C[None, :], bases[w], 0.0)
                term_RC = tl.fma(u_RC.to(tl.float32), history_RC, tapped_RC)
                tapped_RC = tl.where((position_I >= w)[:, None], term_RC, tapped_RC)
            y_IC += tl.sum(z_R[:, None] * tapped_RC, 0)[None, :]
        else:
            z_IR = _tile_coefficients(h_ptr, f_ptr, i_I, keep_I, r_R, RANK, HIDDEN, PARTS, BK, PROJECTION_DOT, STAGES)
            z_IR = z_IR.to(f_ptr.dtype.element_ty).to(FILTER_DOT)
            history = _history(x_IC, states, keep_E)
            # Masked here for the same reason as in `_history`.
            operands = ()
            for w in tl.static_range(W):
                operands += (tl.where((r_R < RANK)[:, None] & keep_C[None, :], bases[w], 0.0).to(FILTER_DOT),)
            for w in tl.static_range(W):
                k_IC = tl.dot(z_IR, operands[w], input_precision="ieee")
                term_IC = tl.fma(k_IC, history[w].to(tl.float32), y_IC)
                # `where`, not a product with the mask: what a token must not see may be inf or nan.
                y_IC = tl.where((position_I >= w)[:, None], term_IC, y_IC)
    history = _history(x_IC, states, keep_E)
    if HAS_STATIC:
        for w in tl.static_range(W):
            s_IC = tl.broadcast_to(statics[w].to(tl.float32)[None, :], y_IC.shape)
            term_IC = tl.fma(s_IC, history[w].to(tl.float32), y_IC)
            y_IC = tl.where((position_I >= w)[:, None], term_IC, y_IC)
    if RESIDUAL:
        y_IC += x_IC.to(tl.float32)
    y_IC = y_IC.to(x_ptr.dtype.element_ty)
    if ROTATED:
        left_IJ, right_IJ = _halves(y_IC, BJ)
        turned_left_IJ = _turn(left_IJ, -right_IJ.to(tl.float32), cos_IJ, sin_IJ)
        turned_right_IJ = _turn(right_IJ, left_IJ.to(tl.float32), cos_IJ, sin_IJ)
        left_IJ = tl.where(turns_IJ, turned_left_IJ, left_IJ)
        right_IJ = tl.where(turns_IJ, turned_right_IJ, right_IJ)
        y_IC = tl.reshape(tl.permute(tl.join(left_IJ, right_IJ), 0, 2, 1), (BI, 2 * BJ))
    tl.store(y_ptr + (i_I[:, None] * D + d_C[None, :]), y_IC, mask=keep_IC)
    if W > 1:
        # Every thread has read the old state before any writes the new one.
        tl.debug_barrier()
        for w in tl.static_range(W - 1):
            state_E = tl.reshape(history[w].to(state_ptr.dtype.element_ty), (BI * 2 * BJ,))
            tl.store(state_E_ptr + (W - 2 - w), state_E, mask=keep_E)


def _dot_type(*dtypes: torch.dtype) -> tl.dtype:
    """What the matrix units take without losing a digit; float32, which they do not take, is multiplied as it is."""
    if len(set(dtypes)) > 1 or dtypes[0] == torch.float32 or INTERPRETED:
        # The interpreter has no bfloat16 product: it multiplies the bit patterns.
        return tl.float32
    return tl.bfloat16 if dtypes[0] == torch.bfloat16 else tl.float16


@lru_cache
def _block_sizes(batch: int, hidden: int, filter_size: int, kernel_size: int, head_half: int) -> dict[str, int]:
    """Few classes of batch sizes, so that a new one rarely compiles a kernel."""
    # Half as many pairs where a block then stays within a head.
    pairs = _PAIRS if head_half % _PAIRS == 0 or head_half % (_PAIRS // 2) else _PAIRS // 2
    if batch > 1 and filter_size == 2:
        warps = _TILE_WARPS if kernel_size <= 4 else _WARPS
        return {"BI": 16, "BJ": pairs, "PARTS": warps, "BK": 512 // warps, "STAGES": 3, "num_warps": warps}
    if batch > 1:
        pairs = pairs if kernel_size <= 4 else _PAIRS // 2
        return {"BI": 16, "BJ": pairs, "PARTS": _WARPS, "BK": 16, "STAGES": 3, "num_warps": _WARPS}
    sizes = {"BJ": pairs, "STAGES": 3, "num_warps": _WARPS}
    if torch.version.hip is None:
        # Left alone, the compiler saves registers, which nobody else wants, and asks for some when others have come.
        sizes["maxnreg"] = 248
    # 16 bytes for each thread, and as many parts together as registers hold.
    columns = _WARPS * 32 * 16 // (_RANK_BLOCK * filter_size)
    parts = min(16 if kernel_size <= 4 else 8, triton.next_power_of_2(triton.cdiv(hidden, columns)))
    return {"BI": 1, "PARTS": parts, "BK": columns, **sizes}


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
    ys = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    hidden = hidden_states.shape[-1]
    batch = hidden_states.numel() // hidden
    if batch == 0:
        return ys
    rank, kernel_size, _ = bases[0].shape
    head_half = _PAIRS if cos is None else head_dim // 2
    sizes = _block_sizes(batch, hidden, filter_weights[0].element_size(), kernel_size, head_half)
    ends = [0]
    for x in xs:
        pairs = triton.cdiv(x.shape[-1], 2 * head_half) * head_half
        ends.append(ends[-1] + triton.cdiv(pairs, sizes["BJ"]))
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
            WHOLE_BLOCKS=all(x.shape[-1] % (2 * head_half) == 0 and x.shape[-1] // 2 % sizes["BJ"] == 0 for x in xs),
            BR=_RANK_BLOCK,
            PROJECTION_DOT=_dot_type(filter_weights[0].dtype),
            FILTER_DOT=_dot_type(filter_weights[0].dtype, bases[0].dtype),
            # Contraction of what is not `tl.fma` would skip roundings.
            enable_fp_fusion=False,
            **sizes,
        )
    return ys
