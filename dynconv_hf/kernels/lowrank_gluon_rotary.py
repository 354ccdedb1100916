"""RoPE beside the convolution: of what the forward writes, and back, of what the backward reads.

As transformers' `apply_rotary_pos_emb` and its gradient compute it in bfloat16, each product and the sum rounded, so
that the result has the same bits as the convolution followed by it:

    y[c] * cos[c] - y[c + HALF] * sin[c]        and        y[c + HALF] * cos[c] + y[c] * sin[c]

for c < HALF = HEAD_DIM / 2 in each head; transformers' cos and sin say everything twice, and only c < HALF is read.
A warp owns the partners of its channels (`channel_of`): lane j of a row's four holds those of lane j ^ 2.

cos and sin come through a ring in shared memory of their own, beside that of the tokens they belong to.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .packed_tiles import packed
from .run_permuted_layout import RUNS, WARP_CHANNELS, lane_layout, lane_positions, run_starts

__all__ = [
    "allocate_angles_ring",
    "angles_source",
    "angles_steps",
    "is_rotated",
    "rotate_after_runs",
    "rotate_pair",
    "rotation_sign",
]


@gluon.constexpr_function
def angles_ring_layout(head_dim):
    """Shared memory for cos and sin of two tokens of all runs, [2, 2, G, HALF].

    Lanes read 32 bytes of each run; the swizzle gives four runs all banks between them.
    """
    half = head_dim // 2
    return gl.SwizzledSharedLayout(16, 64 // half, half // 16, [3, 2, 1, 0])


@gluon.constexpr_function
def angles_copy_layout(head_dim, warps):
    """[2, 2, G, HALF] for copies from global to shared memory, 16 bytes a lane."""
    lanes_of_row = head_dim // 16
    runs = min(8, 32 // lanes_of_row)
    tokens = 32 // (lanes_of_row * runs)
    lanes = [1, tokens, runs, lanes_of_row]
    return gl.BlockedLayout([1, 1, 1, 8], lanes, [2, 2 // tokens, warps * tokens // 4, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def angles_load_layout(head_dim, warps):
    """[2, 2, G, HALF] in registers: for each lane the 8 frequencies of its channels."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 1, 0, 0], [1, 0, 0, 0]]
    lanes = [[0, 0, 0, 8], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    owners = [[0, 0, 0, 16 * unit if 32 * unit < head_dim else 0] for unit in (1, 2, 4) if unit < warps]
    return gl.DistributedLinearLayout(registers, lanes, owners, [], [2, 2, 8, head_dim // 2])


@gluon.constexpr_function
def heads_layout(head_dim, warps):
    """[G, heads, HALF / 16, 2, 16]: a lane tile, its positions taken apart."""
    units = head_dim // 32
    registers = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [0, 0, 0, 0, 4]]
    lanes = [[0, 0, 0, 0, 8], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]]
    owners = [[0, warp // units, warp % units, 0, 0] for warp in (1, 2, 4) if warp < warps]
    return gl.DistributedLinearLayout(registers, lanes, owners, [], [8, warps // units, units, 2, 16])


@gluon.jit
def is_rotated(ROTATED: gl.constexpr, member, T):
    """Whether RoPE is for this member of the group.

    Never a constant, although T > 0 always holds: around a branch the compiler does not mix the rotation with what
    follows; where it does, the backward spills.
    """
    rotated = T < 0
    for i in gl.static_range(len(ROTATED)):
        if ROTATED[i]:
            rotated = rotated | ((member == i) & (T > 0))
    return rotated


@gluon.jit
def allocate_angles_ring(STAGES: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Shared memory for cos and sin of the tokens of STAGES pairs."""
    shape: gl.constexpr = [STAGES, 2, 2, RUNS, HEAD_DIM // 2]
    return gl.allocate_shared_memory(gl.bfloat16, shape, angles_ring_layout(HEAD_DIM))


@gluon.jit
def angles_rows(HEAD_DIM: gl.constexpr, warps: gl.constexpr):
    """Token of the pair and run of each row of a copy: [1, 2, G, 1] both."""
    layout: gl.constexpr = angles_copy_layout(HEAD_DIM, warps)
    token = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[None, :, None, None]
    run = gl.arange(0, RUNS, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))[None, None, :, None]
    return token + run * 0, run + token * 0


@gluon.jit
def angles_source(cos_ptr, sin_ptr, L, HEAD_DIM: gl.constexpr, warps: gl.constexpr):
    """Where copies read the first pair of each run, [2, 2, G, HALF]: cos, then sin."""
    layout: gl.constexpr = angles_copy_layout(HEAD_DIM, warps)
    which = gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[:, None, None, None]
    frequency = gl.arange(0, HEAD_DIM // 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    token, run = angles_rows(HEAD_DIM, warps)
    offsets = (run * L + token) * HEAD_DIM + frequency[None, None, None, :] + which * 0
    return gl.where(which + offsets * 0 == 0, cos_ptr + offsets, sin_ptr + offsets)


@gluon.jit
def angles_steps(rotated, left, L, HEAD_DIM: gl.constexpr, warps: gl.constexpr):
    """How far copies of the angles go, [1, 2, G, 1]: pairs that begin before this many tokens of a run are copied."""
    token, run = angles_rows(HEAD_DIM, warps)
    return gl.minimum(left - run * L - token, gl.where(rotated, L, 0))


@gluon.jit
def load_angles(pointer, token, position, mask, HEAD_DIM: gl.constexpr):
    """cos or sin of one token of each run, as a packed tile; `pointer` is to the block's first token."""
    piece = position // 16
    frequency = position + (piece % (HEAD_DIM // 16) // 2 - piece) * 16
    return packed(gl.load(pointer + (token * HEAD_DIM + frequency), mask=mask, other=0.0))


@gluon.jit
def angles_of_pair(stage, HEAD_DIM: gl.constexpr, warps: gl.constexpr):
    """cos and sin of the first token of a pair, then of the second, as lane tiles."""
    first, second = stage.load(angles_load_layout(HEAD_DIM, warps)).permute([2, 3, 0, 1]).split()
    cos, sin = first.split()
    cos_next, sin_next = second.split()
    return (
        for_each_head(cos, HEAD_DIM, warps),
        for_each_head(sin, HEAD_DIM, warps),
        for_each_head(cos_next, HEAD_DIM, warps),
        for_each_head(sin_next, HEAD_DIM, warps),
    )


@gluon.jit
def for_each_head(angles, HEAD_DIM: gl.constexpr, warps: gl.constexpr):
    """[G, HALF] as a lane tile: the same for both halves of a head, and for all heads. Moves no data."""
    layout: gl.constexpr = heads_layout(HEAD_DIM, warps)
    units: gl.constexpr = HEAD_DIM // 32
    angles = angles.reshape([RUNS, units, 16])
    angles = gl.convert_layout(angles, gl.SliceLayout(1, gl.SliceLayout(3, layout)), assert_trivial=True)
    tile = gl.zeros([RUNS, warps // units, units, 2, 16], gl.bfloat16, layout)
    angles, _ = gl.broadcast(angles[:, None, :, None, :], tile)
    tile = angles.permute([1, 2, 0, 3, 4]).reshape([warps, RUNS, WARP_CHANNELS])
    return gl.convert_layout(tile, lane_layout(warps), assert_trivial=True)


@gluon.jit
def rotation_sign(first: gl.constexpr, warps: gl.constexpr):
    """The sign of what is multiplied by sin: `first` in the first half of a head, -first in the second; a packed tile.

    `first` is -1 to rotate, 1 to rotate back.
    """
    second = lane_positions(warps) % WARP_CHANNELS // 16 + run_starts(0, warps)
    return packed(((1 - 2 * second) * first).to(gl.bfloat16))


@gluon.jit
def rotate_pair(y, y_next, rotated, stage, sign, HEAD_DIM: gl.constexpr, warps: gl.constexpr):
    """Both tokens of a pair, packed; `sign` as well."""
    if rotated:
        cos, sin, cos_next, sin_next = angles_of_pair(stage, HEAD_DIM, warps)
        y = rotate(y, packed(cos), packed(sin), sign)
        y_next = rotate(y_next, packed(cos_next), packed(sin_next), sign)
    return y, y_next


@gluon.jit
def rotate_after_runs(
    dy_0, dy_next, dy_last, rotated, cos_ptr, sin_ptr, token, position, left, sign, HEAD_DIM: gl.constexpr
):
    """The three tokens from `token` on, each run's own, packed; pointers are to the block's first token.

    `left` counts the tokens of the sequence from `token` on; `position` is that of each element.
    """
    if rotated:
        cos = load_angles(cos_ptr, token, position, left > 0, HEAD_DIM)
        sin = load_angles(sin_ptr, token, position, left > 0, HEAD_DIM)
        dy_0 = rotate(dy_0, cos, sin, sign)
        cos = load_angles(cos_ptr, token + 1, position, left > 1, HEAD_DIM)
        sin = load_angles(sin_ptr, token + 1, position, left > 1, HEAD_DIM)
        dy_next = rotate(dy_next, cos, sin, sign)
        cos = load_angles(cos_ptr, token + 2, position, left > 2, HEAD_DIM)
        sin = load_angles(sin_ptr, token + 2, position, left > 2, HEAD_DIM)
        dy_last = rotate(dy_last, cos, sin, sign)
    return dy_0, dy_next, dy_last


@gluon.jit
def rotate(y, cos, sin, sign):
    """y * cos + sign * (partner * sin), each rounded to bfloat16; products as fused multiply-adds of -0."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 partner, own;
        mov.b32 own, 0x80008000;
        shfl.sync.bfly.b32 partner, $1, 2, 31, -1;
        fma.rn.bf16x2 partner, partner, $3, own;
        fma.rn.bf16x2 own, $1, $2, own;
        fma.rn.bf16x2 $0, partner, $4, own;
        }""",
        "=r,r,r,r,r",
        [y, cos, sin, sign],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
