"""Lane tiles of bfloat16 as words: two neighbouring channels in one register of 32 bits.

That is how memory and the tensor cores have them. Single bfloat16 values take a register each wherever a loop carries
them or a branch chooses between them, and are taken apart and put together again on the way: that was an eighth of
the instructions in the backward's loop, and more registers than there are.

A packed tile is [warps, G, C / 2] of int32, the even channel in the low half.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .run_permuted_layout import RUNS, WARP_CHANNELS, lane_layout, ring_load_layout

__all__ = [
    "packed",
    "packed_layout",
    "product",
    "tokens_of_pair",
    "transposed",
    "unpacked",
    "where_reached",
    "widened",
]


@gluon.constexpr_function
def packed_layout(warps):
    """[warps, G, C / 2]: a lane holds the words of its 8 channels."""
    return gl.BlockedLayout([1, 1, 4], [1, 8, 4], [warps, 1, 1], [2, 1, 0])


@gluon.jit
def packed(tile):
    """A lane tile of bfloat16 as words."""
    low, high = tile.reshape([tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2]).split()
    words = gl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )
    return gl.convert_layout(words, packed_layout(tile.shape[0]), assert_trivial=True)


@gluon.jit
def unpacked(words):
    """The lane tile of bfloat16 again."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
    )
    return interleaved(low, high)


@gluon.jit
def widened(words):
    """A packed tile as a lane tile of float32."""
    low = (words << 16).to(gl.float32, bitcast=True)
    high = (words & -65536).to(gl.float32, bitcast=True)
    return interleaved(low, high)


@gluon.jit
def interleaved(even, odd):
    """A lane tile from its even and its odd channels."""
    tile = gl.join(even, odd).reshape([even.shape[0], even.shape[1], 2 * even.shape[2]])
    return gl.convert_layout(tile, lane_layout(even.shape[0]), assert_trivial=True)


@gluon.jit
def tokens_of_pair(stage, warps: gl.constexpr):
    """Both tokens of a pair from a stage of the ring, packed."""
    lanes: gl.constexpr = lane_layout(warps)
    tile = stage.load(ring_load_layout(warps)).reshape([2, RUNS, warps, WARP_CHANNELS])
    first, second = tile.permute([2, 1, 3, 0]).split()
    first = gl.convert_layout(first, lanes, assert_trivial=True)
    second = gl.convert_layout(second, lanes, assert_trivial=True)
    return packed(first), packed(second)


@gluon.jit
def where_reached(words, reach, bit: gl.constexpr):
    """The words of the runs for which the tap of `bit` counts, else zero.

    A choice, not a product: x may be inf or nan there.
    """
    if reach is None:
        return words
    else:
        reached = (reach & (1 << bit))[None, :, None] + gl.zeros_like(words)
        # Not `where`, with which the backward spills.
        return gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $2, 0; selp.b32 $0, $1, 0, p; }",
            "=r,r,r",
            [words, reached],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )


@gluon.jit
def product(a, b):
    """a * b of packed tiles, as a lane tile; as a fused multiply-add of -0, since the plain product needs Hopper."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
        "=r,r,r",
        [unpacked(a), unpacked(b)],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def transposed(tile):
    """Each 8 x 8 of a lane tile that one register of a warp holds, transposed."""
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [tile], dtype=gl.bfloat16, is_pure=True, pack=2
    )
