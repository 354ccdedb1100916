"""Low-rank dynamic convolution, forward, for NVIDIA tensor cores: see `run_permuted_layout` for the idea.

Every byte of x is read once (and a halo of 3 rows for each run), by asynchronous copies into a ring in shared memory;
filters live only in registers, between the product that makes them and the sums that use them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .lowrank_gluon_rotary import (
    allocate_angles_ring,
    angles_source,
    angles_steps,
    is_rotated,
    rotate_pair,
    rotation_sign,
)
from .packed_tiles import packed, packed_layout, tokens_of_pair, unpacked, where_reached, widened
from .run_permuted_layout import (
    RANKS,
    RUNS,
    TAPS,
    VECTOR,
    WARP_CHANNELS,
    allocate_coefficients,
    async_load,
    chosen,
    coefficients_of_pair,
    copied_channels,
    copied_runs,
    copied_tokens,
    copy_pair,
    filters_of_pair,
    lane_channels,
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

__all__ = ["lowrank_forward_kernel"]


@gluon.jit(do_not_specialize=["T", "z_stride", "z_member_stride", "rotary_tokens"])
def lowrank_forward_kernel(
    x_ptrs,
    coefficients_ptr,
    basis_ptrs,
    static_ptrs,
    positions_ptr,
    state_ptrs,
    cos_ptr,
    sin_ptr,
    y_ptrs,
    channels,
    x_strides,
    T,
    z_stride,
    z_member_stride,
    rotary_tokens,
    R: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    ROTATED: gl.constexpr,
    L: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    RESIDUAL: gl.constexpr,
):
    """Grid (sum of channels / (32 * WARPS), ceil(T / (8 * L)), B).

    Names in the plural are tuples, an element for each member of the group; `x_strides` in vectors of 16 bytes.
    HEAD_DIM is 0 without RoPE; `rotary_tokens` is T, or 0 where all sequences share cos and sin.
    """
    BLOCK: gl.constexpr = WARPS * WARP_CHANNELS
    PAIRS: gl.constexpr = L // 2
    mma: gl.constexpr = mma_layout(WARPS)
    member, channel = located(channels, BLOCK)
    D = chosen(channels, member)
    x_stride = chosen(x_strides, member) * VECTOR
    batch = gl.program_id(2).to(gl.int64)
    start = gl.program_id(1) * (RUNS * L)
    left = T - start
    token = batch * T + start
    x_ptr = chosen(x_ptrs, member) + token * x_stride + channel
    y_ptr = chosen(y_ptrs, member) + token * D + channel
    coefficients_ptr += token * z_stride + member * z_member_stride
    basis_ptr = chosen(basis_ptrs, member) + channel
    static_ptr = None if static_ptrs is None else chosen(static_ptrs, member) + channel
    state_ptr = None if state_ptrs is None else chosen(state_ptrs, member) + (batch * ((TAPS - 1) * D) + channel)

    coefficients = load_coefficients(coefficients_ptr, 0, RUNS * L, L, L, left, R, z_stride, WARPS)
    basis = load_basis(basis_ptr, static_ptr, R, D, HEAD_DIM, WARPS)

    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2, RUNS, BLOCK], ring_layout())
    source = x_ptr + (copied_runs(WARPS) * (L * x_stride) + copied_channels(HEAD_DIM, WARPS))
    offsets = copied_tokens(WARPS) * x_stride
    # How many tokens of a run to copy: none past its end, and none beyond the sequence.
    steps = gl.minimum(left - copied_runs(WARPS) * L, L)
    if HEAD_DIM > 0:
        rotated = is_rotated(ROTATED, member, T)
        sign = rotation_sign(-1, WARPS)
        angles_ring = allocate_angles_ring(STAGES, HEAD_DIM)
        first_angle = (batch * rotary_tokens + start) * HEAD_DIM
        cos_ptr += first_angle
        sin_ptr += first_angle
        angles = angles_source(cos_ptr, sin_ptr, L, HEAD_DIM, WARPS)
        angle_steps = angles_steps(rotated, left, L, HEAD_DIM, WARPS)
    for stage in gl.static_range(STAGES - 1):
        copy_pair(ring.index(stage), source, offsets, 2 * stage, steps, WARPS)
        source += 2 * x_stride
        if HEAD_DIM > 0:
            async_load(angles_ring.index(stage), angles, mask=2 * stage < angle_steps)
            angles += 2 * HEAD_DIM
        async_copy.commit_group()

    x_3 = packed(load_halo(x_ptr, state_ptr, 3, start, T, L, x_stride, D, HEAD_DIM, WARPS))
    x_2 = packed(load_halo(x_ptr, state_ptr, 2, start, T, L, x_stride, D, HEAD_DIM, WARPS))
    x_1 = packed(load_halo(x_ptr, state_ptr, 1, start, T, L, x_stride, D, HEAD_DIM, WARPS))

    z_shared = allocate_coefficients(PAIRS)
    store_coefficients(z_shared, 0, coefficients)
    if positions_ptr is not None:
        reach_shared = load_reach(positions_ptr + token, 0, PAIRS, L, L, left, WARPS)

    columns = product_columns(basis, WARPS).permute([0, 1, 4, 2, 3, 5]).reshape([RANKS, TAPS * BLOCK])
    basis_operand = gl.convert_layout(columns, gl.DotOperandLayout(1, mma, 2))
    zero = gl.zeros([2 * RUNS, TAPS * BLOCK], gl.float32, mma)

    destination = y_ptr + (run_starts(L, WARPS) * D + lane_channels(HEAD_DIM, WARPS))
    left_of_run = left - run_starts(L, WARPS)
    for pair in range(PAIRS):
        async_copy.wait_group(STAGES - 2)
        # The copies past the end are masked, not skipped: the count of groups in flight stays the same.
        ahead = pair + STAGES - 1
        copy_pair(ring.index(ahead % STAGES), source, offsets, 2 * ahead, steps, WARPS)
        source += 2 * x_stride
        if HEAD_DIM > 0:
            async_load(angles_ring.index(ahead % STAGES), angles, mask=2 * ahead < angle_steps)
            angles += 2 * HEAD_DIM
        async_copy.commit_group()

        x_0, x_next = tokens_of_pair(ring.index(pair % STAGES), WARPS)
        z_operand = coefficients_of_pair(z_shared, pair).load(gl.DotOperandLayout(0, mma, 2))
        k_0, k_1, k_2, k_3, n_0, n_1, n_2, n_3 = filters_of_pair(mma_v2(z_operand, basis_operand, zero), WARPS)
        reach = None if positions_ptr is None else reach_shared.index(pair).load(row_layout(packed_layout(WARPS)))

        y = filtered(x_0, x_1, x_2, x_3, k_0, k_1, k_2, k_3, reach, 0, RESIDUAL)
        y_next = filtered(x_next, x_0, x_1, x_2, n_0, n_1, n_2, n_3, reach, 4, RESIDUAL)
        if HEAD_DIM > 0:
            y, y_next = rotate_pair(
                packed(y), packed(y_next), rotated, angles_ring.index(pair % STAGES), sign, HEAD_DIM, WARPS
            )
            y = unpacked(y)
            y_next = unpacked(y_next)
        gl.store(destination, y, mask=2 * pair < left_of_run)
        gl.store(destination + D, y_next, mask=2 * pair + 1 < left_of_run)
        destination += 2 * D
        x_3 = x_1
        x_2 = x_0
        x_1 = x_next


@gluon.jit
def filtered(x_0, x_1, x_2, x_3, k_0, k_1, k_2, k_3, reach, bit: gl.constexpr, RESIDUAL: gl.constexpr):
    """One token of the convolution: x_w is the input w steps back, k_w its filter, `bit` + w its bit of `reach`."""
    x = widened(where_reached(x_0, reach, bit))
    y = gl.fma(k_0, x, widened(x_0)) if RESIDUAL else k_0 * x
    y = gl.fma(k_1, widened(where_reached(x_1, reach, bit + 1)), y)
    y = gl.fma(k_2, widened(where_reached(x_2, reach, bit + 2)), y)
    y = gl.fma(k_3, widened(where_reached(x_3, reach, bit + 3)), y)
    return y.to(gl.bfloat16)
