"""What the Triton kernels share: how a tile of a sequence is read, at its own rows or some steps away.

A tile is rows t_I of one sequence by channels d_J. Offsets within a tile are 32-bit and start at the tile's first
row, whose own offset is 64-bit: tensors may have more than 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    x_ptr,
    stride_t,
    state_ptr,
    t,
    i_I,
    d_J,
    keep_J,
    T,
    D,
    STATE: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """x at rows t + i_I. Rows before 0 come from the state, where there is one; what lies outside is 0."""
    row_I = t + i_I
    inside_I = (row_I >= 0) & (row_I < T)
    tile_ptr = x_ptr + t.to(tl.int64) * stride_t
    x_IJ = tl.load(
        tile_ptr + (i_I[:, None] * stride_t + d_J[None, :]), mask=inside_I[:, None] & keep_J[None, :], other=0.0
    )
    if HAS_STATE:
        s_I = row_I + STATE
        before_I = (row_I < 0) & (s_I >= 0)
        state_IJ = tl.load(
            state_ptr + s_I[:, None] * D + d_J[None, :], mask=before_I[:, None] & keep_J[None, :], other=0.0
        )
        x_IJ = tl.where(before_I[:, None], state_IJ.to(x_IJ.dtype), x_IJ)
    return x_IJ


@triton.jit
def load_positions(positions_ptr, stride_t, row_I, T):
    """-1 outside the sequence, where no tap counts."""
    mask_I = (row_I >= 0) & (row_I < T)
    return tl.load(positions_ptr + row_I.to(tl.int64) * stride_t, mask=mask_I, other=-1)


@triton.jit
def tap_counts(positions_ptr, stride_t, row_I, w, T, HAS_POSITIONS: tl.constexpr):
    """Where tap w of the token at row_I counts: inside the sequence and, by its position, inside its document."""
    counts_I = (row_I >= 0) & (row_I < T)
    if HAS_POSITIONS:
        counts_I = load_positions(positions_ptr, stride_t, row_I, T) >= w
    return counts_I


@triton.jit
def store_rows(
    y_ptr,
    state_ptr,
    y_IJ,
    t,
    i_I,
    d_J,
    keep_J,
    T,
    D,
    STATE: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """Writes rows t + i_I of a contiguous (T, D) tensor; those before 0 go to the state's own (STATE, D) tensor."""
    row_I = t + i_I
    inside_I = (row_I >= 0) & (row_I < T)
    tile_ptr = y_ptr + t.to(tl.int64) * D
    tl.store(
        tile_ptr + (i_I[:, None] * D + d_J[None, :]),
        y_IJ.to(y_ptr.dtype.element_ty),
        mask=inside_I[:, None] & keep_J[None, :],
    )
    if HAS_STATE:
        s_I = row_I + STATE
        before_I = (row_I < 0) & (s_I >= 0)
        tl.store(
            state_ptr + s_I[:, None] * D + d_J[None, :],
            y_IJ.to(state_ptr.dtype.element_ty),
            mask=before_I[:, None] & keep_J[None, :],
        )
