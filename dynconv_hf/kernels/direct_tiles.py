"""What the kernels with filters in memory share: runs of tokens, blocks of channels, taps packed into words.

A program owns RUNS runs of L consecutive tokens by a block of channels, and advances all its runs side by side, U
tokens a step. What a token needs of those before it is in registers, so that each element is loaded once, but for the
W - 1 tokens before each run. The rows of a tile are runs: at step i, row r is token start + r * L + i.

A block of channels is BH heads by BP channels of each: several whole heads, or a part of one large head. The sizes are
chosen so that a thread's vector of channels and its filters lie in the same lanes, and no tile changes its layout.

The W taps of one token and head lie side by side in memory: they are moved as few words of WORD bits.

Shape suffixes: I rows of a tile, J its channels, H its heads, W taps, U tokens of a step (both tuples).
"""

import triton
import triton.language as tl


@triton.jit
def block_channels(block, HEADS: tl.constexpr, P: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr):
    """The first head of a block and its channels d_J, with what of them exists."""
    PARTS: tl.constexpr = (P + BP - 1) // BP
    head, p = (block // PARTS) * BH, (block % PARTS) * BP
    j_J = tl.arange(0, BH * BP)
    if BH == 1:
        d_J = head * P + p + j_J
        keep_J = p + j_J < P
    elif P == BP:
        d_J = head * P + j_J
        keep_J = d_J < HEADS * P
    else:
        head_J, p_J = head + j_J // BP, j_J % BP
        d_J = head_J * P + p_J
        keep_J = (head_J < HEADS) & (p_J < P)
    return head, d_J, keep_J


@triton.jit
def as_words(f_ptr, WORD: tl.constexpr):
    """A pointer to words of WORD bits; of the tensor's own type where a word is one element."""
    if f_ptr.dtype.element_ty.primitive_bitwidth == WORD:
        return f_ptr
    elif WORD == 64:
        return f_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    else:
        return f_ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def load_words(words_ptr, offset_IH, mask_IH, WORDS: tl.constexpr):
    """The words of one token's heads, a tuple of WORDS (I, H)."""
    words = ()
    for j in tl.static_range(WORDS):
        words += (tl.load(words_ptr + (offset_IH + j), mask=mask_IH, other=0),)
    return words


@triton.jit
def spread_words(words, BP: tl.constexpr):
    """The words at each of their head's channels: a tuple of (I, J)."""
    wide = ()
    for j in tl.static_range(len(words)):
        wide += (spread(words[j], BP),)
    return wide


@triton.jit
def unpack_tap(words, w: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr):
    """Tap w of words that hold W taps of type dtype, float32, in the words' shape."""
    BITS: tl.constexpr = dtype.primitive_bitwidth
    TAPS: tl.constexpr = W // len(words)
    word = words[w // TAPS]
    if TAPS == 1:
        return word.to(tl.float32)
    else:
        tap = (word >> (BITS * (w % TAPS))).to(tl.int16 if BITS == 16 else tl.int32)
        return tap.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def pack_word(tap_W, j: tl.constexpr, WORD: tl.constexpr, dtype: tl.constexpr):
    """Word j of the taps in type dtype, as `as_words` points to it."""
    BITS: tl.constexpr = dtype.primitive_bitwidth
    TAPS: tl.constexpr = WORD // BITS
    if TAPS == 1:
        word = tap_W[j].to(dtype)
    else:
        for i in tl.static_range(TAPS):
            tap = tap_W[j * TAPS + i].to(dtype)
            bits = tap.to(tl.uint16 if BITS == 16 else tl.uint32, bitcast=True)
            bits = bits.to(tl.int64 if WORD == 64 else tl.int32) << (BITS * i)
            word = bits if i == 0 else word | bits
    return word


@triton.jit
def spread(f_IH, N: tl.constexpr):
    """Each column becomes N columns: a head's value that of each of its channels."""
    if N == 1:
        return f_IH
    return tl.broadcast_to(f_IH[:, :, None], [f_IH.shape[0], f_IH.shape[1], N]).reshape(
        f_IH.shape[0], f_IH.shape[1] * N
    )


@triton.jit
def tap_filter(words, s_W, w: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr):
    """Tap w of a token's filter: head-wise, static, or their sum; (I, J), float32. The words are spread."""
    if len(words) == 0:
        return s_W[w]
    else:
        k_IJ = unpack_tap(words, w, W, dtype)
        if len(s_W) > 0:
            k_IJ += s_W[w]
        return k_IJ


@triton.jit
def carry(x_W, NEW: tl.constexpr):
    """The same tiles, for the next step of a loop; the first NEW of them are made in this one.

    Triton fetches ahead only in loops that hand on nothing but results of this step's operations, and this is one to
    Triton. LLVM, later, knows that nothing is to be done.
    """
    carried = x_W[:NEW]
    for w in tl.static_range(NEW, len(x_W)):
        carried += (tl.fma(x_W[w], 1.0, -0.0),)
    return carried


@triton.jit
def load_static(s_ptr, d_J, keep_J, D: tl.constexpr, W: tl.constexpr, HAS_STATIC: tl.constexpr, ROWS: tl.constexpr):
    """The static filter, W (ROWS, J), float32; an empty tuple where there is none."""
    s_W = ()
    if HAS_STATIC:
        for w in tl.static_range(W):
            s_J = tl.load(s_ptr + w * D + d_J, mask=keep_J, other=0.0).to(tl.float32)
            s_W += (tl.broadcast_to(s_J[None, :], (ROWS, s_J.shape[0])),)
    return s_W


@triton.jit
def load_positions(positions_ptr, row_I, stride_t, T, HAS_POSITIONS: tl.constexpr):
    """The position of each row's token, -1 where there is none; without positions, what is not used."""
    if HAS_POSITIONS:
        return tl.load(positions_ptr + row_I.to(tl.int64) * stride_t, mask=row_I < T, other=-1)
    else:
        return row_I


@triton.jit
def where_counts(with_tap, without_tap, position_I, w: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """Leaves tap w out where it reaches out of its document; a choice, not a factor 0: it may be inf or nan there."""
    if HAS_POSITIONS:
        return tl.where((position_I >= w)[:, None], with_tap, without_tap)
    else:
        return with_tap


@triton.jit
def load_before(
    x_ptr,
    offset_IJ,
    stride_t,
    state_ptr,
    row_I,
    d_J,
    keep_J,
    T,
    D: tl.constexpr,
    STATE: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """x of the STATE tokens before row_I, newest first, each (I, J), float32. Before token 0: the state, or 0."""
    x_W = ()
    for back in tl.static_range(1, STATE + 1):
        inside_I = (row_I >= back) & (row_I - back < T)
        x_IJ = tl.load(x_ptr - back * stride_t + offset_IJ, mask=inside_I[:, None] & keep_J[None, :], other=0.0)
        if HAS_STATE:
            # Runs are no shorter than the state: only the one at the very start reaches back into it.
            before_I = row_I == 0
            state_IJ = tl.load(
                state_ptr + before_I[:, None] * 0 + ((STATE - back) * D + d_J)[None, :],
                mask=before_I[:, None] & keep_J[None, :],
                other=0.0,
            )
            x_IJ = tl.where(before_I[:, None], state_IJ.to(x_IJ.dtype), x_IJ)
        x_W += (x_IJ.to(tl.float32),)
    return x_W
