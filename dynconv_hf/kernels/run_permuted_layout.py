"""Run-permuted time: the register layout shared by the Gluon kernels of the low-rank convolution.

A convolution over time with filters from a matrix product meets two layouts that do not agree: the tensor cores
deal the rows and columns of a tile out over the lanes of a warp in a fixed pattern, and the convolution wants, in
one lane, the same channel at neighbouring times. Going from one to the other through shared memory, once for each
tap, is what makes the straightforward kernel slow: about 28 bytes of shared-memory traffic an element.

But which time a row of a tile stands for is ours to choose. A thread block owns RUNS = 8 runs of L consecutive
tokens, and advances all of them two tokens at a time. In tile `pair`, row 8 * h + g stands for the token

    start + g * L + 2 * pair + h         (g: the run, h: the first or second token of the pair).

The tensor cores give lane 4 * g + j the rows g and g + 8: two consecutive tokens of run g. From pair to pair a lane
keeps its run, so that the tokens one, two and three steps back are values the lane already holds: the shifts of the
convolution become renamings of registers. Likewise for the columns: of the 32 channels of a warp, the tensor cores
give lane j columns (q, e) -> 8 * q + 2 * j + e with e in {0, 1}; we let that column stand for channel
8 * j + 2 * q + e, and each lane then holds 8 neighbouring channels: one 16-byte vector. With that, filters,
inputs and outputs share the register layout `lane_layout`, and a product's result is used where it lies.

Which 32 channels a warp owns is ours to choose, too: see `channel_of`. Below, a *position* counts the channels of a
thread block as its warps own them.

One launch serves a group of tensors, which differ in their channels but share B and T: the first axis of the grid
runs over the blocks of them all. Which tensor it is, its pointers and strides are values, not constants: one compiled
kernel serves all, and what is chosen by `member` stays in registers that all threads share.

In the shapes below G is the runs of one thread block, C = 32 the channels of one warp, K = 16 the ranks: R, then the
static filter with coefficient 1, then zeros. `warps` counts the warps of a thread block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere

__all__ = [
    "RANKS",
    "RUNS",
    "TAPS",
    "VECTOR",
    "WARP_CHANNELS",
    "allocate_coefficients",
    "async_load",
    "channel_of",
    "chosen",
    "coefficients_of_pair",
    "copied_channels",
    "copied_runs",
    "copied_tokens",
    "copy_pair",
    "filters_of_pair",
    "lane_channels",
    "lane_layout",
    "lane_positions",
    "load_basis",
    "load_coefficients",
    "load_halo",
    "load_reach",
    "located",
    "mma_layout",
    "product_columns",
    "ring_layout",
    "ring_load_layout",
    "row_layout",
    "run_starts",
    "store_coefficients",
]

RUNS = gl.constexpr(8)
WARP_CHANNELS = gl.constexpr(32)
RANKS = gl.constexpr(16)
TAPS = gl.constexpr(4)
# Elements of 16 bytes. Strides are counted in them, so that the compiler sees that rows are aligned.
VECTOR = gl.constexpr(8)

# Gluon renamed this one between Triton 3.6 and 3.9; 3.9 keeps the old name, but only to raise an error.
async_load = getattr(ampere.async_copy, "async_load", ampere.async_copy.async_copy_global_to_shared)
HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reinterpret(memory, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory with another shape and layout; the method became public between 3.6 and 3.9."""
    if HAS_REINTERPRET:
        return memory.reinterpret(memory.dtype, shape, layout)
    else:
        return memory._reinterpret(memory.dtype, shape, layout)


@gluon.constexpr_function
def lane_layout(warps):
    """[warps, G, C]: a lane holds 8 neighbouring channels of one run."""
    return gl.BlockedLayout([1, 1, 8], [1, 8, 4], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def row_layout(tile_layout):
    """[G]: for each lane, what belongs to its run, to be used with tiles of this layout."""
    return gl.SliceLayout(0, gl.SliceLayout(2, tile_layout))


@gluon.constexpr_function
def mma_layout(warps):
    """[2 * G, TAPS * warps * C]: a product for one pair of tokens, each warp making its own columns."""
    return gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])


@gluon.constexpr_function
def ring_layout():
    """Shared memory for two tokens of all runs, [2, G, warps * C].

    Eight lanes read 16 bytes each at a time, 64 bytes from each of two runs; the swizzle puts the 64 bytes of odd
    runs into the other half of the banks.
    """
    return gl.SwizzledSharedLayout(32, 1, 2, [2, 1, 0])


@gluon.constexpr_function
def ring_load_layout(warps):
    """[2, G, warps * C] in registers, as `lane_layout` with both tokens of the pair in the lane."""
    return gl.BlockedLayout([2, 1, 8], [1, 8, 4], [1, 1, warps], [2, 1, 0])


@gluon.constexpr_function
def copy_layout(warps):
    """[2, G, warps * C] for copies from global to shared memory: a warp asks for whole rows, not for 64 bytes."""
    lanes_of_row = min(warps * 4, 32)
    return gl.BlockedLayout([1, 1, 8], [1, 32 // lanes_of_row, lanes_of_row], [1, warps, 1], [2, 1, 0])


@gluon.jit
def located(channels, block: gl.constexpr):
    """Which member of the group this thread block belongs to, and its first channel there."""
    member = 0
    channel = gl.program_id(0) * block
    for i in gl.static_range(len(channels) - 1):
        beyond = (member == i) & (channel >= channels[i])
        channel -= gl.where(beyond, channels[i], 0)
        member = gl.where(beyond, i + 1, member)
    return member, channel


@gluon.jit
def chosen(values, member):
    """The value of one member of the group."""
    value = values[0]
    for i in gl.static_range(1, len(values)):
        value = gl.where(member == i, values[i], value)
    return value


@gluon.jit
def channel_of(position, HEAD_DIM: gl.constexpr):
    """The channel at a position, both counted from the block's first.

    RoPE (HEAD_DIM is not 0) rotates channel c of a head with channel c + HEAD_DIM / 2. A warp's positions are 16
    channels of the first half of a head and their 16 partners, 32 bytes each: still whole sectors of memory.
    """
    if HEAD_DIM <= WARP_CHANNELS:
        return position
    else:
        # As the position and a shift of whole pieces, from which the compiler sees that pieces stay whole.
        pieces: gl.constexpr = HEAD_DIM // 16
        piece = position // 16
        source = piece // pieces * pieces + piece % 2 * (pieces // 2) + piece % pieces // 2
        return position + (source - piece) * 16


@gluon.jit
def copied_runs(warps: gl.constexpr):
    """The run of each row of a copy: [1, G, 1]."""
    return gl.arange(0, RUNS, gl.SliceLayout(0, gl.SliceLayout(2, copy_layout(warps))))[None, :, None]


@gluon.jit
def copied_channels(HEAD_DIM: gl.constexpr, warps: gl.constexpr):
    """The channel of each element of a copy, counted from the block's first: [1, 1, warps * C]."""
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, copy_layout(warps)))
    return channel_of(gl.arange(0, warps * WARP_CHANNELS, layout), HEAD_DIM)[None, None, :]


@gluon.jit
def copied_tokens(warps: gl.constexpr):
    """Which token of its pair each row of a copy is: [2, 1, 1]."""
    return gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, copy_layout(warps))))[:, None, None]


@gluon.jit
def copy_pair(stage, source, offsets, step, steps, warps: gl.constexpr):
    """Starts to copy the tokens `step` and `step + 1` of each run; those from `steps` on ([1, G, 1]) become zero.

    `source` + `offsets` points to both, [2, G, warps * C]. `source` goes on from pair to pair, `offsets` stays: all
    these pointers, carried from pair to pair, would not fit into the registers.
    """
    async_load(stage, source + offsets, mask=step + copied_tokens(warps) < steps)


@gluon.jit
def lane_positions(warps: gl.constexpr):
    """The position of each element of a lane tile: [warps, 1, C]."""
    layout: gl.constexpr = lane_layout(warps)
    warp = gl.arange(0, warps, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    position = gl.arange(0, WARP_CHANNELS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    return (warp * WARP_CHANNELS)[:, None, None] + position[None, None, :]


@gluon.jit
def lane_channels(HEAD_DIM: gl.constexpr, warps: gl.constexpr):
    """The channel of each element of a lane tile, counted from the block's first: [warps, 1, C]."""
    return channel_of(lane_positions(warps), HEAD_DIM)


@gluon.jit
def run_starts(L, warps: gl.constexpr):
    """The first token of each run, counted from the block's start: [1, G, 1]."""
    return (gl.arange(0, RUNS, row_layout(lane_layout(warps))) * L)[None, :, None]


@gluon.jit
def load_coefficients(z_ptr, first, rows: gl.constexpr, L, steps, left, R: gl.constexpr, stride, warps: gl.constexpr):
    """Coefficients in tile order: row 16 * pair + 8 * h + g is token g * L + first + 2 * pair + h; bfloat16.

    `steps` bounds the tokens of a run, `left` the tokens of the sequence. Ranks from R on, and rows out of bounds, are
    1: rank R is the static filter, and whatever the others multiply is zero.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [warps, 1], [1, 0])
    row = gl.arange(0, rows, gl.SliceLayout(1, layout))
    rank = gl.arange(0, RANKS, gl.SliceLayout(0, layout))
    step = first + (row // 16) * 2 + (row // 8) % 2
    token = (row % 8) * L + step
    mask = ((step < steps) & (token < left))[:, None] & (rank < R)[None, :]
    return gl.load(z_ptr + (token * stride)[:, None] + rank[None, :], mask=mask, other=1.0).to(gl.bfloat16)


@gluon.constexpr_function
def coefficients_layout():
    return gl.SwizzledSharedLayout(8, 4, 2, [1, 0])


@gluon.jit
def allocate_coefficients(pairs: gl.constexpr):
    """Shared memory for coefficients, [pairs * 2 * G, K]: free of bank conflicts as a matrix operand."""
    return gl.allocate_shared_memory(gl.bfloat16, [pairs * 2 * RUNS, RANKS], coefficients_layout())


@gluon.jit
def store_coefficients(memory, piece, coefficients):
    """Puts coefficients as from `load_coefficients` into shared memory; `piece` counts such tiles."""
    rows: gl.constexpr = coefficients.shape[0]
    pieces = reinterpret(memory, [memory.shape[0] // rows, rows, RANKS], coefficients_layout())
    pieces.index(piece).store(coefficients)


@gluon.jit
def coefficients_of_pair(memory, pair):
    """[2 * G, K] in shared memory."""
    pairs: gl.constexpr = memory.shape[0] // (2 * RUNS)
    return reinterpret(memory, [pairs, 2 * RUNS, RANKS], coefficients_layout()).index(pair)


@gluon.jit
def load_reach(positions_ptr, first, pairs: gl.constexpr, L, steps, left, warps: gl.constexpr):
    """Which taps reach back within the token's own sequence, in shared memory: [pairs, G], int32.

    Bit w is for tap w of the first token of a pair, bit 4 + w for the second.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    row = gl.arange(0, pairs * RUNS, layout)
    step = first + (row // RUNS) * 2
    token = (row % RUNS) * L + step
    position = gl.load(positions_ptr + token, mask=(step < steps) & (token < left), other=0)
    position_next = gl.load(positions_ptr + token + 1, mask=(step + 1 < steps) & (token + 1 < left), other=0)
    reach = gl.zeros([pairs * RUNS], gl.int32, layout)
    for tap in gl.static_range(TAPS):
        reach |= gl.where(position >= tap, 1 << tap, 0)
        reach |= gl.where(position_next >= tap, 1 << (TAPS + tap), 0)
    shared_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    memory = gl.allocate_shared_memory(gl.int32, [pairs * RUNS], shared_layout)
    memory.store(reach)
    return reinterpret(memory, [pairs, RUNS], shared_layout)


@gluon.jit
def load_basis(basis_ptr, static_ptr, R: gl.constexpr, D, HEAD_DIM: gl.constexpr, warps: gl.constexpr):
    """The basis with the static filter as rank R and zeros from there on: [16, TAPS, warps * C], bfloat16."""
    BLOCK: gl.constexpr = warps * WARP_CHANNELS
    lanes_of_row: gl.constexpr = min(BLOCK // 8, 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // lanes_of_row, lanes_of_row], [warps, 1, 1], [2, 1, 0])
    rank = gl.arange(0, RANKS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    tap = gl.arange(0, TAPS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    position = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    offsets = tap * D + channel_of(position, HEAD_DIM)
    basis = gl.load(basis_ptr + rank * (TAPS * D) + offsets, mask=rank < R, other=0.0).to(gl.bfloat16)
    if static_ptr is not None:
        zeros = gl.zeros([RANKS, TAPS, BLOCK], gl.int32, layout)
        static = gl.load(static_ptr + zeros + offsets, mask=zeros + rank == R, other=0.0).to(gl.bfloat16)
        basis = gl.where(zeros + rank == R, static, basis)
    return basis


@gluon.jit
def product_columns(basis, warps: gl.constexpr):
    """[16, TAPS, warps * C] split for the columns of products: [16, TAPS, warps, j, q, e], channel = 8 j + 2 q + e.

    Lane j of a row's four holds channels 8 j to 8 j + 7.
    """
    return basis.reshape([RANKS, TAPS, warps, 4, 4, 2])


@gluon.jit
def filters_of_pair(product, warps: gl.constexpr):
    """The product of coefficients and basis as lane tiles: taps 0 to 3 of the first token, then of the second."""
    lanes: gl.constexpr = lane_layout(warps)
    # [h, g, tap, q, warp, j, e] -> [warp, g, (j, q, e), h, tap]: moves no data, the layouts agree.
    taps = product.reshape([2, RUNS, TAPS, 4, warps, 4, 2]).permute([4, 1, 5, 3, 6, 0, 2])
    even, odd = taps.reshape([warps, RUNS, WARP_CHANNELS, 2, 2, 2]).split()
    tap_0, tap_2 = even.split()
    tap_1, tap_3 = odd.split()
    first_0, second_0 = tap_0.split()
    first_1, second_1 = tap_1.split()
    first_2, second_2 = tap_2.split()
    first_3, second_3 = tap_3.split()
    return (
        gl.convert_layout(first_0, lanes, assert_trivial=True),
        gl.convert_layout(first_1, lanes, assert_trivial=True),
        gl.convert_layout(first_2, lanes, assert_trivial=True),
        gl.convert_layout(first_3, lanes, assert_trivial=True),
        gl.convert_layout(second_0, lanes, assert_trivial=True),
        gl.convert_layout(second_1, lanes, assert_trivial=True),
        gl.convert_layout(second_2, lanes, assert_trivial=True),
        gl.convert_layout(second_3, lanes, assert_trivial=True),
    )


@gluon.jit
def load_halo(
    x_ptr, state_ptr, back: gl.constexpr, start, T, L, stride, D, HEAD_DIM: gl.constexpr, warps: gl.constexpr
):
    """The inputs `back` tokens before each run; before the sequence, the initial state or zero."""
    local = run_starts(L, warps)
    channels = lane_channels(HEAD_DIM, warps)
    token = start + local
    pointers = x_ptr + ((local - back) * stride + channels)
    mask = (token >= back) & (token - back < T)
    halo = gl.load(pointers, mask=mask, other=0.0)
    if state_ptr is not None:
        # Runs are longer than the state: only the run at the very start reaches back into it.
        zeros = gl.zeros_like(halo).to(gl.int32)
        state = gl.load(state_ptr + zeros + ((TAPS - 1 - back) * D + channels), mask=zeros + token == 0, other=0.0)
        halo = gl.where(zeros + token == 0, state, halo)
    return halo
