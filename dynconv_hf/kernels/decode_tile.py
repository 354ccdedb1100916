"""A tile of tokens, each of a sequence of its own, in a block of channels, for the kernel in `decode`.

Shape suffixes: I tokens, R a block of ranks, C channels, P taps, E channels of each tap, N parts of the hidden state,
K their elements, G words of several channels of a token.
"""

import triton
import triton.language as tl

from .decode_rotary import pair_channels

__all__ = ["tile"]


@triton.jit
def _coefficients(
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
def _stack(parts):
    """The parts, a power of two of them, beside each other in new last dimensions."""
    # As often as the longest group, 8 taps, is halved.
    for _ in tl.static_range(3):
        if len(parts) > 1:
            pairs = ()
            for n in tl.static_range(len(parts) // 2):
                pairs += (tl.join(parts[n], parts[n + len(parts) // 2]),)
            parts = pairs
    return parts[0]


@triton.jit
def _unpack(words, COUNT: tl.constexpr, ELEMENT: tl.constexpr, SLOTS: tl.constexpr):
    """The bits of element n of every channel, for each n; a word has SLOTS elements, a channel COUNT of them in a row.

    Each of the COUNT is a tuple over the SLOTS channels that as many words hold.
    """
    bits: tl.constexpr = ELEMENT.primitive_bitwidth
    elements = ()
    for n in tl.static_range(COUNT):
        channels = ()
        for slot in tl.static_range(SLOTS):
            channels += ((words[(slot * COUNT + n) // SLOTS] >> (slot * COUNT + n) % SLOTS * bits).to(ELEMENT),)
        elements += (channels,)
    return elements


@triton.jit
def _pack(elements, word, WORD: tl.constexpr, SLOTS: tl.constexpr):
    """Word number `word` of those that hold the elements, laid down as `_unpack` finds them."""
    bits: tl.constexpr = WORD.primitive_bitwidth // SLOTS
    packed = elements[word * SLOTS % len(elements)][word * SLOTS // len(elements)].to(WORD)
    for slot in tl.static_range(1, SLOTS):
        element = elements[(word * SLOTS + slot) % len(elements)][(word * SLOTS + slot) // len(elements)]
        packed |= element.to(WORD) << slot * bits
    return packed


@triton.jit
def tile(
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
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HEAD_HALF: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    ELEMENT: tl.constexpr,
    WORD: tl.constexpr,
    SLOTS: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    PARTS: tl.constexpr,
    BK: tl.constexpr,
    PROJECTION_DOT: tl.constexpr,
    FILTER_DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The convolutions of a tile of tokens, (I, C), float32; their states are shifted.

    All taps together, and several channels to a word: loads, stores and changes of layout, each of which every warp
    waits for, are what there must be few of.
    """
    BI: tl.constexpr = i_I.shape[0]
    BC: tl.constexpr = 2 * BJ
    # In one dimension: of two without a contiguous one, Triton may let neighbouring threads read different sequences.
    g_G = tl.arange(0, BI * BC // SLOTS)
    i_G = g_G // (BC // SLOTS)
    d_G = pair_channels(block, g_G % (BC // SLOTS) * SLOTS, BJ, HEAD_HALF, ROTARY_HALF)
    keep_G = i_G < tokens if WHOLE_BLOCKS else (i_G < tokens) & (d_G < D)
    x_G = tl.load((x_ptr + (i_G * D + d_G)).to(tl.pointer_type(WORD)), mask=keep_G)
    state_G_ptr = (state_ptr + (i_G * D + d_G) * (W - 1)).to(tl.pointer_type(WORD))
    words = ()
    for n in tl.static_range(W - 1):
        words += (tl.load(state_G_ptr + n, mask=keep_G),)
    w_P = tl.arange(0, TAPS)
    keep_PC = (w_P < W)[:, None] & keep_C[None, :]
    if HAS_STATIC:
        s_PC = tl.load(s_ptr + (w_P[:, None] * D + d_C[None, :]), mask=keep_PC, other=0.0)
    filter_IPC = tl.zeros((BI, TAPS, BC), tl.float32)
    for r in tl.range(0, RANK, BR, num_stages=1, loop_unroll_factor=1):
        r_R = r + tl.arange(0, BR)
        keep_RPC = (r_R < RANK)[:, None, None] & keep_PC[None, :, :]
        u_RPC_ptr = u_ptr + (((r_R[:, None] * W + w_P[None, :]) * D)[:, :, None] + d_C[None, None, :])
        u_RPC = tl.load(u_RPC_ptr, mask=keep_RPC)
        z_IR = _coefficients(h_ptr, f_ptr, i_I, keep_I, r_R, RANK, HIDDEN, PARTS, BK, PROJECTION_DOT, STAGES)
        z_IR = z_IR.to(f_ptr.dtype.element_ty).to(FILTER_DOT)
        # Zeros are put in here and not by the load: a tile that is ready changes its layout where it was loaded, and
        # the program would wait for it there, before it has asked for what makes the coefficients.
        u_RE = tl.reshape(tl.where(keep_RPC, u_RPC, 0.0).to(FILTER_DOT), (BR, TAPS * BC))
        filter_IE = tl.dot(z_IR, u_RE, tl.reshape(filter_IPC, (BI, TAPS * BC)), input_precision="ieee")
        filter_IPC = tl.reshape(filter_IE, (BI, TAPS, BC))
    if HAS_STATIC:
        filter_IPC += s_PC.to(tl.float32)[None, :, :]
    elements, taps = _unpack((x_G,), 1, ELEMENT, SLOTS), ()
    if W > 1:
        elements = _unpack(words, W - 1, ELEMENT, SLOTS) + elements
    for w in tl.static_range(TAPS):
        taps += (_stack(elements[W - 1 - w if w < W else 0]),)
    history_GP = _stack(taps).to(x_ptr.dtype.element_ty, bitcast=True)
    history_IPC = tl.permute(tl.reshape(history_GP, (BI, BC, TAPS)), 0, 2, 1).to(tl.float32)
    # `where`, not a product with the mask: what a token must not see may be inf or nan.
    seen_IP = (w_P < W)[None, :] & (position_I[:, None] >= w_P[None, :])
    term_IPC = tl.where(seen_IP[:, :, None], filter_IPC * history_IPC, 0.0)
    if RESIDUAL:
        term_IPC += tl.where((w_P == 0)[None, :, None], history_IPC, 0.0)
    if W > 1:
        # Every thread has read the old state before any writes the new one.
        tl.debug_barrier()
        for n in tl.static_range(W - 1):
            tl.store(state_G_ptr + n, _pack(elements[1:], n, WORD, SLOTS), mask=keep_G)
    return tl.sum(term_IPC, 1)
