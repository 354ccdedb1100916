"""Low-rank dynamic convolution, backward, for NVIDIA tensor cores: see `run_permuted_layout` for the idea.

One pass over x and dy makes dx, and partial sums of the rest. With g_w[t, d] = dy[t, d] * x[t - w, d]:

    dx[t - w] += k_w[t] * dy[t]     the filter made for token t serves all its taps: dx of the last three tokens is
                                    carried in registers and written once tap 3 has been added;
    dz[t, r]  = sum_{w, d} g_w[t, d] * u[r, w, d]
    du[r, w, d] = sum_t z[t, r] * g_w[t, d],    and ds as rank R, where z is 1.

The registers that hold g are, as they lie, the left operand of the product that makes dz. Transposed 8 x 8 by the
tensor cores' own instruction, they are the right operand of the one that makes du, which stays in registers for the
whole run. dz needs a sum over channels, du one over runs: a second, small kernel adds the partial sums of the thread
blocks in a fixed order (`lowrank_gluon_reduction`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .lowrank_gluon_rotary import (
    allocate_angles_ring,
    angles_source,
    angles_steps,
    is_rotated,
    rotate_after_runs,
    rotate_pair,
    rotation_sign,
)
from .packed_tiles import (
    packed,
    packed_layout,
    product,
    tokens_of_pair,
    transposed,
    where_reached,
    widened,
)
from .run_permuted_layout import (
    RANKS,
    RUNS,
    TAPS,
    VECTOR,
    WARP_CHANNELS,
    allocate_coefficients,
    async_load,
    channel_of,
    chosen,
    coefficients_of_pair,
    copied_channels,
    copied_runs,
    copied_tokens,
    copy_pair,
    filters_of_pair,
    lane_channels,
    lane_layout,
    lane_positions,
    load_basis,
    load_coefficients,
    load_halo,
    load_reach,
    located,
    mma_layout,
    product_columns,
    ring_layout,
    row_layout,
    run_starts,
    store_coefficients,
)

__all__ = ["lowrank_backward_kernel"]


@gluon.constexpr_function
def warp_mma_layout(warps):
    """[warps, 2 * G, K]: a product of its own for each warp."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.jit(do_not_specialize=["T", "L", "z_stride", "z_member_stride", "rotary_tokens"])
def lowrank_backward_kernel(
    dy_ptrs,
    x_ptrs,
    coefficients_ptr,
    basis_ptrs,
    static_ptrs,
    positions_ptr,
    state_ptrs,
    cos_ptr,
    sin_ptr,
    dx_ptrs,
    dz_partial_ptr,
    du_partial_ptr,
    channels,
    x_strides,
    T,
    L,
    z_stride,
    z_member_stride,
    rotary_tokens,
    R: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    ROTATED: gl.constexpr,
    MAX_L: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    RESIDUAL: gl.constexpr,
):
    """Grid (sum of channels / (32 * WARPS), ceil(T / (8 * L)), B). L is even, from 2 * STAGES - 2 to MAX_L.

    Names in the plural are tuples, an element for each member of the group; `x_strides` in vectors of 16 bytes.
    HEAD_DIM is 0 without RoPE; `rotary_tokens` is T, or 0 where all sequences share cos and sin.
    dz_partial: (blocks of all members, B * chunks, L / 2, 16, 16), rows in tile order. du_partial: (B * chunks, 16, 4,
    D) of each member, one after the other.
    """
    BLOCK: gl.constexpr = WARPS * WARP_CHANNELS
    lanes: gl.constexpr = lane_layout(WARPS)
    mma: gl.constexpr = mma_layout(WARPS)
    warp_mma: gl.constexpr = warp_mma_layout(WARPS)
    member, channel = located(channels, BLOCK)
    D = chosen(channels, member)
    x_stride = chosen(x_strides, member) * VECTOR
    batch = gl.program_id(2).to(gl.int64)
    chunk = batch * gl.num_programs(1) + gl.program_id(1)
    start = gl.program_id(1) * (RUNS * L)
    left = T - start
    token = batch * T + start
    pairs = L // 2
    dy_ptr = chosen(dy_ptrs, member) + token * D + channel
    x_ptr = chosen(x_ptrs, member) + token * x_stride + channel
    dx_ptr = chosen(dx_ptrs, member) + token * D + channel
    coefficients_ptr += token * z_stride + member * z_member_stride
    basis_ptr = chosen(basis_ptrs, member) + channel
    static_ptr = None if static_ptrs is None else chosen(static_ptrs, member) + channel
    state_ptr = None if state_ptrs is None else chosen(state_ptrs, member) + (batch * ((TAPS - 1) * D) + channel)

    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2, RUNS, BLOCK], ring_layout())
    dy_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2, RUNS, BLOCK], ring_layout())
    # A pointer that all threads share and offsets of 32 bits: pointers of its own to both would cost each thread four
    # registers more through the loop.
    x_source = x_ptr
    dy_source = dy_ptr
    x_offsets = (copied_runs(WARPS) * L + copied_tokens(WARPS)) * x_stride + copied_channels(HEAD_DIM, WARPS)
    dy_offsets = (copied_runs(WARPS) * L + copied_tokens(WARPS)) * D + copied_channels(HEAD_DIM, WARPS)
    # How many tokens of a run to copy: none past its end, and none beyond the sequence.
    steps = gl.minimum(left - copied_runs(WARPS) * L, L)
    if HEAD_DIM > 0:
        rotated = is_rotated(ROTATED, member, T)
        sign = rotation_sign(1, WARPS)
        angles_ring = allocate_angles_ring(STAGES, HEAD_DIM)
        first_angle = (batch * rotary_tokens + start) * HEAD_DIM
        cos_ptr += first_angle
        sin_ptr += first_angle
        angles = angles_source(cos_ptr, sin_ptr, L, HEAD_DIM, WARPS)
        angle_steps = angles_steps(rotated, left, L, HEAD_DIM, WARPS)
    for stage in gl.static_range(STAGES - 1):
        copy_pair(x_ring.index(stage), x_source, x_offsets, 2 * stage, steps, WARPS)
        copy_pair(dy_ring.index(stage), dy_source, dy_offsets, 2 * stage, steps, WARPS)
        x_source += 2 * x_stride
        dy_source += 2 * D
        if HEAD_DIM > 0:
            async_load(angles_ring.index(stage), angles, mask=2 * stage < angle_steps)
            angles += 2 * HEAD_DIM
        async_copy.commit_group()

    # What more than 128 tokens of each run take would not fit into the registers at once.
    AT_ONCE: gl.constexpr = min(MAX_L, 128)
    z_shared = allocate_coefficients(MAX_L // 2)
    for piece in range(gl.cdiv(L, AT_ONCE)):
        z = load_coefficients(coefficients_ptr, piece * AT_ONCE, RUNS * AT_ONCE, L, L, left, R, z_stride, WARPS)
        store_coefficients(z_shared, piece, z)
    # The two pairs after each run: their taps reach back into it.
    z_after = load_coefficients(coefficients_ptr, L, 4 * RUNS, L, L + 4, left, R, z_stride, WARPS)
    basis = load_basis(basis_ptr, static_ptr, R, D, HEAD_DIM, WARPS)
    x_3 = packed(load_halo(x_ptr, state_ptr, 3, start, T, L, x_stride, D, HEAD_DIM, WARPS))
    x_2 = packed(load_halo(x_ptr, state_ptr, 2, start, T, L, x_stride, D, HEAD_DIM, WARPS))
    x_1 = packed(load_halo(x_ptr, state_ptr, 1, start, T, L, x_stride, D, HEAD_DIM, WARPS))
    z_after_shared = allocate_coefficients(2)
    store_coefficients(z_after_shared, 0, z_after)
    if positions_ptr is not None:
        positions_ptr += token
        reach_shared = load_reach(positions_ptr, 0, MAX_L // 2, L, L, left, WARPS)
        reach_after_shared = load_reach(positions_ptr, L, 2, L, L + 4, left, WARPS)

    # The basis twice: as right operand of the product that makes filters, and of the one that makes dz.
    columns = product_columns(basis, WARPS)
    filter_basis = gl.allocate_shared_memory(
        gl.bfloat16, [RANKS, TAPS * BLOCK], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    )
    filter_basis.store(columns.permute([0, 1, 4, 2, 3, 5]).reshape([RANKS, TAPS * BLOCK]))
    dz_basis = gl.allocate_shared_memory(
        gl.bfloat16, [WARPS, RANKS, TAPS * WARP_CHANNELS], gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    )
    dz_basis.store(columns.permute([2, 0, 1, 4, 3, 5]).reshape([WARPS, RANKS, TAPS * WARP_CHANNELS]))

    zero = gl.zeros([2 * RUNS, TAPS * BLOCK], gl.float32, mma)
    warp_zero = gl.zeros([WARPS, 2 * RUNS, RANKS], gl.float32, warp_mma)
    du = gl.zeros([RANKS, TAPS * BLOCK], gl.float32, mma)

    # One element of the 16 x 16 of a pair for each thread, all warps' shares of it in that thread.
    dz_sum_layout: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [0, 1])
    dz_shared = gl.allocate_shared_memory(
        gl.float32, [WARPS, 2 * RUNS * RANKS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    dz_element = gl.arange(0, 2 * RUNS * RANKS, gl.SliceLayout(0, dz_sum_layout))
    dz_plane = gl.program_id(0).to(gl.int64) * gl.num_programs(1) * gl.num_programs(2)
    dz_destination = dz_partial_ptr + (dz_plane + chunk) * (RUNS * RANKS) * L

    run = run_starts(L, WARPS)
    channels = lane_channels(HEAD_DIM, WARPS)
    # Of dx complete with the first token of a pair.
    destination = dx_ptr + (run * D + channels - 3 * D)
    left_of_run = left - run
    # What dx of the last three tokens has so far.
    dx_3 = gl.zeros([WARPS, RUNS, WARP_CHANNELS], gl.float32, lanes)
    dx_2 = dx_3
    dx_1 = dx_3
    for pair in range(pairs):
        async_copy.wait_group(STAGES - 2)
        x_0, x_next = tokens_of_pair(x_ring.index(pair % STAGES), WARPS)
        dy_0, dy_next = tokens_of_pair(dy_ring.index(pair % STAGES), WARPS)
        if HEAD_DIM > 0:
            of_pair = angles_ring.index(pair % STAGES)
            dy_0, dy_next = rotate_pair(dy_0, dy_next, rotated, of_pair, sign, HEAD_DIM, WARPS)
        # The copies past the end are masked, not skipped: the count of groups in flight stays the same.
        ahead = pair + STAGES - 1
        copy_pair(x_ring.index(ahead % STAGES), x_source, x_offsets, 2 * ahead, steps, WARPS)
        copy_pair(dy_ring.index(ahead % STAGES), dy_source, dy_offsets, 2 * ahead, steps, WARPS)
        x_source += 2 * x_stride
        dy_source += 2 * D
        if HEAD_DIM > 0:
            async_load(angles_ring.index(ahead % STAGES), angles, mask=2 * ahead < angle_steps)
            angles += 2 * HEAD_DIM
        async_copy.commit_group()

        reach = None if positions_ptr is None else reach_shared.index(pair).load(row_layout(packed_layout(WARPS)))

        z_operand = coefficients_of_pair(z_shared, pair).load(gl.DotOperandLayout(0, mma, 2))
        filters = mma_v2(z_operand, filter_basis.load(gl.DotOperandLayout(1, mma, 2)), zero)
        done_3, done_2, dx_3, dx_2, dx_1 = advance_dx(filters, dy_0, dy_next, dx_3, dx_2, dx_1, reach, RESIDUAL, WARPS)
        # What a run's first tokens add to dx of the tokens before it, the run before it adds too.
        gl.store(destination, done_3, mask=(pair > 1) & (2 * pair - 3 < left_of_run))
        gl.store(destination + D, done_2, mask=(pair > 0) & (2 * pair - 2 < left_of_run))
        destination += 2 * D

        g_0 = product(dy_0, where_reached(x_0, reach, 0))
        g_1 = product(dy_0, where_reached(x_1, reach, 1))
        g_2 = product(dy_0, where_reached(x_2, reach, 2))
        g_3 = product(dy_0, where_reached(x_3, reach, 3))
        n_0 = product(dy_next, where_reached(x_next, reach, 4))
        n_1 = product(dy_next, where_reached(x_0, reach, 5))
        n_2 = product(dy_next, where_reached(x_1, reach, 6))
        n_3 = product(dy_next, where_reached(x_2, reach, 7))
        # [warp, g, (j, q, e), h, tap] -> [warp, (h, g), (tap, q, j, e)]: the operand as it lies.
        g_rows = joined(g_0, g_1, g_2, g_3, n_0, n_1, n_2, n_3, WARPS).permute([0, 5, 1, 6, 3, 2, 4])
        g_operand = gl.convert_layout(
            g_rows.reshape([WARPS, 2 * RUNS, TAPS * WARP_CHANNELS]),
            gl.DotOperandLayout(0, warp_mma, 2),
            assert_trivial=True,
        )
        dz = mma_v2(g_operand, dz_basis.permute([0, 2, 1]).load(gl.DotOperandLayout(1, warp_mma, 2)), warp_zero)

        # After the transpose lane (g, j) holds runs 2 j and 2 j + 1 of column g of each 8 x 8:
        # [warp, column, run pair, q, run bit, h, tap] -> [(h, run), (tap, q, warp, column)].
        g_columns = joined(
            transposed(g_0),
            transposed(g_1),
            transposed(g_2),
            transposed(g_3),
            transposed(n_0),
            transposed(n_1),
            transposed(n_2),
            transposed(n_3),
            WARPS,
        ).permute([5, 2, 4, 6, 3, 0, 1])
        g_operand = gl.convert_layout(
            g_columns.reshape([2 * RUNS, TAPS * BLOCK]), gl.DotOperandLayout(1, mma, 2), assert_trivial=True
        )
        z_operand = coefficients_of_pair(z_shared, pair).permute([1, 0]).load(gl.DotOperandLayout(0, mma, 2))
        du = mma_v2(z_operand, g_operand, du)

        dz_shared.store(dz.reshape([WARPS, 2 * RUNS * RANKS]))
        dz_pair = gl.sum(dz_shared.load(dz_sum_layout), axis=0)
        gl.store(dz_destination + dz_element, dz_pair.to(dz_partial_ptr.dtype.element_ty))
        dz_destination += 2 * RUNS * RANKS
        x_3 = x_1
        x_2 = x_0
        x_1 = x_next

    # Three more tokens complete dx of each run's last three.
    # Zero, but the compiler does not know: it makes anew what else it would keep in registers through the loop.
    again = L % 2
    run = run_starts(L, WARPS) + (L + again)
    left_after = left - run
    zero_after = again.to(gl.bfloat16)
    position = lane_positions(WARPS) + again * WARP_CHANNELS
    after = dy_ptr + (run * D + channel_of(position, HEAD_DIM))
    dy_0 = packed(gl.load(after, mask=left_after > 0, other=zero_after))
    dy_next = packed(gl.load(after + D, mask=left_after > 1, other=zero_after))
    dy_last = packed(gl.load(after + 2 * D, mask=left_after > 2, other=zero_after))
    if HEAD_DIM > 0:
        dy_0, dy_next, dy_last = rotate_after_runs(
            dy_0, dy_next, dy_last, rotated, cos_ptr, sin_ptr, run, position, left_after, sign, HEAD_DIM
        )
    reach = None if positions_ptr is None else reach_after_shared.index(0).load(row_layout(packed_layout(WARPS)))
    reach_last = None if positions_ptr is None else reach_after_shared.index(1).load(row_layout(packed_layout(WARPS)))
    z_operand = coefficients_of_pair(z_after_shared, 0).load(gl.DotOperandLayout(0, mma, 2))
    filters = mma_v2(z_operand, filter_basis.load(gl.DotOperandLayout(1, mma, 2)), zero)
    done_3, done_2, dx_3, dx_2, dx_1 = advance_dx(filters, dy_0, dy_next, dx_3, dx_2, dx_1, reach, RESIDUAL, WARPS)
    z_operand = coefficients_of_pair(z_after_shared, 1).load(gl.DotOperandLayout(0, mma, 2))
    filters = mma_v2(z_operand, filter_basis.load(gl.DotOperandLayout(1, mma, 2)), zero)
    # Of this pair only the first token matters, and of what it completes only the oldest.
    done_1, _, _, _, _ = advance_dx(filters, dy_last, dy_last, dx_3, dx_2, dx_1, reach_last, RESIDUAL, WARPS)
    gl.store(destination, done_3, mask=left_after > -3)
    gl.store(destination + D, done_2, mask=left_after > -2)
    gl.store(destination + 2 * D, done_1, mask=left_after > -1)

    # Where the member's partial sums of du begin: behind those of all channels of the members before it.
    chunk = (batch + again) * gl.num_programs(1) + gl.program_id(1)
    before = (gl.program_id(0) * BLOCK - channel + again).to(gl.int64) * gl.num_programs(1) * gl.num_programs(2)
    du_partial_ptr += (before + chunk * D) * (RANKS * TAPS) + channel
    store_du(du, du_partial_ptr, R, D, static_ptr is not None, HEAD_DIM, WARPS)


@gluon.jit
def advance_dx(filters, dy_0, dy_next, dx_3, dx_2, dx_1, reach, RESIDUAL: gl.constexpr, warps: gl.constexpr):
    """Adds what two tokens give to dx of themselves and the three before; the two oldest are then complete.

    Returns those two in bfloat16, and dx of the last three tokens, oldest first.
    """
    k_0, k_1, k_2, k_3, n_0, n_1, n_2, n_3 = filters_of_pair(filters, warps)
    done_3 = gl.fma(k_3, widened(where_reached(dy_0, reach, 3)), dx_3)
    done_2 = gl.fma(k_2, widened(where_reached(dy_0, reach, 2)), dx_2)
    done_2 = gl.fma(n_3, widened(where_reached(dy_next, reach, 7)), done_2)
    dx_3 = gl.fma(k_1, widened(where_reached(dy_0, reach, 1)), dx_1)
    dx_3 = gl.fma(n_2, widened(where_reached(dy_next, reach, 6)), dx_3)
    own = widened(where_reached(dy_0, reach, 0))
    own_next = widened(where_reached(dy_next, reach, 4))
    dx_2 = gl.fma(k_0, own, widened(dy_0)) if RESIDUAL else k_0 * own
    dx_2 = gl.fma(n_1, widened(where_reached(dy_next, reach, 5)), dx_2)
    dx_1 = gl.fma(n_0, own_next, widened(dy_next)) if RESIDUAL else n_0 * own_next
    return done_3.to(gl.bfloat16), done_2.to(gl.bfloat16), dx_3, dx_2, dx_1


@gluon.jit
def joined(g_0, g_1, g_2, g_3, n_0, n_1, n_2, n_3, warps: gl.constexpr):
    """Lane tiles of four taps of two tokens in one: [warps, G, j, q, e, h, tap]."""
    even = gl.join(gl.join(g_0, n_0), gl.join(g_2, n_2))
    odd = gl.join(gl.join(g_1, n_1), gl.join(g_3, n_3))
    return gl.join(even, odd).reshape([warps, RUNS, 4, 4, 2, 2, TAPS])


@gluon.jit
def store_du(du, destination, R: gl.constexpr, D, STATIC: gl.constexpr, HEAD_DIM: gl.constexpr, warps: gl.constexpr):
    """du from the order of products' columns to [16, TAPS, channels], and only the ranks in use to memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [warps, 1, 1], [2, 1, 0])
    columns = du.reshape([RANKS, TAPS, 4, warps, 4, 2]).permute([0, 1, 3, 4, 2, 5])
    du = gl.convert_layout(columns.reshape([RANKS, TAPS, warps * WARP_CHANNELS]), layout)
    rank = gl.arange(0, RANKS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    tap = gl.arange(0, TAPS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    position = gl.arange(0, warps * WARP_CHANNELS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    channel = channel_of(position, HEAD_DIM)
    gl.store(destination + ((rank * TAPS + tap) * D + channel), du, mask=rank < R + STATIC)
