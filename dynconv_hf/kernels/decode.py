"""One token of the low-rank convolution for each sequence, in one launch, in Triton.

For a group of up to three tensors made from the same hidden state (queries, keys and values): their filters, the
convolutions, the shift of their states in place, and RoPE.

Between two tokens there is little to compute and everything to wait for, so a program asks for all it needs at once,
and makes the coefficients of its tensor by itself: reading them from another launch would take longer.

Products and sums are fused where `tl.fma` says so, and nowhere else: RoPE is to round as PyTorch does.

Shape suffixes: I tokens (each of a sequence of its own), C channels, J half of them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .decode_ops import MAX_GROUP
from .decode_rotary import halves, pair_channels, turn
from .decode_tile import tile
from .decode_token import one_token
from .launch import INTERPRETED, on_device, up_to_registers

__all__ = ["decode_step"]

_RANK_BLOCK = 16
# Pairs of channels that a program has.
_PAIRS = 32
_WARPS = 8
# Of the loads that make a tile's coefficients.
_STAGES = 3
# By their bytes.
_BITS = {2: tl.uint16, 4: tl.uint32, 8: tl.uint64}
# Of a tile of tokens, where registers allow: there is more than one program for each processor, and so they run side
# by side.
_TILE_WARPS = 4


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
    TAPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ROTATED: tl.constexpr,
    HEAD_HALF: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    ELEMENT: tl.constexpr,
    WORD: tl.constexpr,
    SLOTS: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    PARTS: tl.constexpr,
    BK: tl.constexpr,
    PROJECTION_DOT: tl.constexpr,
    FILTER_DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A token, or a tile of tokens, by a block of one tensor's channels; `pair_channels` says which.

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

    d_C = pair_channels(block, tl.arange(0, 2 * BJ), BJ, HEAD_HALF, ROTARY_HALF)
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

    # Everything is asked for before anything is waited for.
    if HAS_POSITIONS:
        position_I = tl.load(positions_ptr + (b + i_I) * positions_stride, mask=keep_I, other=-1)
    else:
        position_I = tl.full((BI,), W, tl.int32)
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
    if BI == 1:
        y_IC = one_token(
            h_ptr,
            x_ptr,
            f_ptr,
            u_ptr,
            s_ptr,
            state_ptr,
            d_C,
            keep_C,
            position_I,
            D,
            HIDDEN,
            RANK,
            W,
            RESIDUAL,
            HAS_STATIC,
            BR,
            PARTS,
            BK,
        )
    else:
        y_IC = tile(
            h_ptr,
            x_ptr,
            f_ptr,
            u_ptr,
            s_ptr,
            state_ptr,
            block,
            d_C,
            keep_C,
            i_I,
            keep_I,
            tokens,
            position_I,
            D,
            HIDDEN,
            RANK,
            W,
            TAPS,
            RESIDUAL,
            HAS_STATIC,
            HEAD_HALF,
            ROTARY_HALF,
            WHOLE_BLOCKS,
            ELEMENT,
            WORD,
            SLOTS,
            BJ,
            BR,
            PARTS,
            BK,
            PROJECTION_DOT,
            FILTER_DOT,
            STAGES,
        )
    y_IC = y_IC.to(x_ptr.dtype.element_ty)
    if ROTATED:
        left_IJ, right_IJ = halves(y_IC, BJ)
        turned_left_IJ = turn(left_IJ, -right_IJ.to(tl.float32), cos_IJ, sin_IJ)
        turned_right_IJ = turn(right_IJ, left_IJ.to(tl.float32), cos_IJ, sin_IJ)
        left_IJ = tl.where(turns_IJ, turned_left_IJ, left_IJ)
        right_IJ = tl.where(turns_IJ, turned_right_IJ, right_IJ)
        y_IC = tl.reshape(tl.permute(tl.join(left_IJ, right_IJ), 0, 2, 1), (BI, 2 * BJ))
    tl.store(y_ptr + (i_I[:, None] * D + d_C[None, :]), y_IC, mask=keep_I[:, None] & keep_C[None, :])


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
        return {"BI": 16, "BJ": pairs, "PARTS": warps, "BK": 512 // warps, "num_warps": warps}
    if batch > 1:
        pairs = pairs if kernel_size <= 4 else _PAIRS // 2
        return {"BI": 16, "BJ": pairs, "PARTS": _WARPS, "BK": 16, "num_warps": _WARPS}
    # With fewer registers the compiler would ask for some of the data when other has come.
    sizes = {"BJ": pairs, "num_warps": _WARPS, **up_to_registers(248)}
    # 16 bytes for each thread, and as many parts together as registers hold.
    columns = _WARPS * 32 * 16 // (_RANK_BLOCK * filter_size)
    parts = min(16 if kernel_size <= 4 else 8, triton.next_power_of_2(triton.cdiv(hidden, columns)))
    return {"BI": 1, "PARTS": parts, "BK": columns, **sizes}


def _words(batch: int, tensors: Sequence[torch.Tensor], multiples: Sequence[int]) -> dict[str, Any]:
    """How many channels of the tensors, read as bits, make a word: 8 bytes where all `multiples` allow it.

    A single token is not read as words.
    """
    size = tensors[0].element_size()
    slots = 8 // size
    if batch == 1 or any(n % slots for n in multiples) or any(tensor.data_ptr() % 8 for tensor in tensors):
        slots = 1
    return {"SLOTS": slots, "ELEMENT": _BITS[size], "WORD": _BITS[size * slots]}


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
    rotary_half = head_half if cos is None else cos.shape[-1] // 2
    sizes = _block_sizes(batch, hidden, filter_weights[0].element_size(), kernel_size, head_half)
    xs = [x.contiguous() for x in xs]
    channels = [x.shape[-1] for x in xs]
    ends = [0]
    for count in channels:
        pairs = triton.cdiv(count, 2 * head_half) * head_half
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
            *channels,
            *channels[:1] * (MAX_GROUP - len(xs)),
            0 if positions is None or positions.shape[0] == 1 else positions.stride(0),
            0 if cos is None or cos.shape[0] == 1 else cos.shape[-1],
            ends[1],
            ends[2],
            HIDDEN=hidden,
            RANK=rank,
            W=kernel_size,
            TAPS=triton.next_power_of_2(kernel_size),
            RESIDUAL=residual,
            HAS_STATIC=len(static_filters) > 0,
            HAS_POSITIONS=positions is not None,
            ROTATED=0 if cos is None else sum(turns << g for g, turns in enumerate(rotated)),
            HEAD_HALF=head_half,
            ROTARY_HALF=rotary_half,
            WHOLE_BLOCKS=all(count % (2 * head_half) == 0 and count // 2 % sizes["BJ"] == 0 for count in channels),
            **_words(batch, (*xs, *states), (*channels, head_half, rotary_half)),
            BR=_RANK_BLOCK,
            STAGES=_STAGES,
            PROJECTION_DOT=_dot_type(filter_weights[0].dtype),
            FILTER_DOT=_dot_type(filter_weights[0].dtype, bases[0].dtype),
            # Contraction of what is not `tl.fma` would skip roundings.
            enable_fp_fusion=False,
            **sizes,
        )
    return ys
