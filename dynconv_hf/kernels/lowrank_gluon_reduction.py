"""What `lowrank_gluon_backward` leaves: its partial sums, added in a fixed order, and the gradient of the state."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = ["add_partial_sums", "lowrank_state_gradient_kernel"]

DZ_ROWS = 64
DU_ELEMENTS = 512
DU_AHEAD = 16


def add_partial_sums(
    dz_partial: torch.Tensor,
    du_partial: torch.Tensor,
    dcoefficients: torch.Tensor,
    dbases: Sequence[torch.Tensor],
    dstatic_filters: Sequence[torch.Tensor] | Sequence[None],
) -> None:
    """Fills dcoefficients (B, T, members, R) and each member's dbasis (R, 4, D) and dstatic_filter (4, D), or None.

    dz_partial: (blocks of channels of all members, B * chunks, pairs of tokens of a run, 16, 16). du_partial: (B *
    chunks, 16, 4, D) of each member, one after the other. Both float32; all are contiguous.
    """
    batch, tokens, members, rank = dcoefficients.shape
    blocks, chunks, pairs, rows, _ = dz_partial.shape
    channels = tuple(dbasis.shape[2] for dbasis in dbases)
    static = dstatic_filters[0] is not None
    dz_programs = -(-chunks * pairs * rows // DZ_ROWS)
    du_programs = tuple((rank + static) * 4 * size // DU_ELEMENTS for size in channels)
    lowrank_reduction_kernel[(members * dz_programs + sum(du_programs),)](
        dz_partial,
        du_partial,
        dcoefficients,
        tuple(dbases),
        tuple(dstatic_filters) if static else None,
        channels,
        du_programs,
        tokens,
        2 * pairs,
        chunks // batch,
        chunks,
        dz_programs,
        R=rank,
        BLOCK=sum(channels) // blocks,
        DZ_ROWS=DZ_ROWS,
        DU_ELEMENTS=DU_ELEMENTS,
        DU_AHEAD=DU_AHEAD,
        num_warps=4,
    )


# How many blocks' partial sums of dz are loaded at once.
DZ_AHEAD = tl.constexpr(8)


@triton.jit
def _chosen(values, member):
    """The value of one member of the group."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(member == i, values[i], value)
    return value


@triton.jit
def _located(index, sizes):
    """Which member of the group an index falls to, members of these sizes one after the other, and the index there."""
    member = 0
    for i in tl.static_range(len(sizes) - 1):
        beyond = (member == i) & (index >= sizes[i])
        index -= tl.where(beyond, sizes[i], 0)
        member = tl.where(beyond, i + 1, member)
    return member, index


@triton.jit
def _before(sizes, member):
    """The sum of the sizes of the members before this one."""
    total = 0
    for i in tl.static_range(len(sizes) - 1):
        total += tl.where(i < member, sizes[i], 0)
    return total


@triton.jit(do_not_specialize=["T", "L", "sequence_chunks", "chunks", "dz_programs"])
def lowrank_reduction_kernel(
    dz_partial_ptr,
    du_partial_ptr,
    dz_ptr,
    dbasis_ptrs,
    dstatic_ptrs,
    channels,
    du_programs,
    T,
    L,
    sequence_chunks,
    chunks,
    dz_programs,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    DZ_ROWS: tl.constexpr,
    DU_ELEMENTS: tl.constexpr,
    DU_AHEAD: tl.constexpr,
):
    """Grid (members * dz_programs + sum of du_programs,), the two kinds of sums one after the other in one launch.

    Names in the plural are tuples, an element for each member of the group.
    dz_partial: (blocks of BLOCK channels of all members, chunks, L / 2, 16, 16), a pair's 16 rows being 8 * h + g for
    token h of run g. du_partial: (chunks, 16, 4, D) of each member, one after the other.
    """
    program = tl.program_id(0)
    if program < len(channels) * dz_programs:
        member = program // dz_programs
        first_row = (program % dz_programs).to(tl.int64) * DZ_ROWS
        plane = chunks.to(tl.int64) * L * 128
        partial_ptr = dz_partial_ptr + _before(channels, member) // BLOCK * plane
        output_ptr = dz_ptr + member * R
        blocks = _chosen(channels, member) // BLOCK
        shape = (T, L, sequence_chunks, chunks)
        _reduce_dz(partial_ptr, output_ptr, first_row, shape, blocks, plane, len(channels) * R, R, DZ_ROWS)
    else:
        member, program = _located(program - len(channels) * dz_programs, du_programs)
        D = _chosen(channels, member)
        partial_ptr = du_partial_ptr + _before(channels, member) * (chunks.to(tl.int64) * 64)
        dbasis_ptr = _chosen(dbasis_ptrs, member)
        dstatic_ptr = None if dstatic_ptrs is None else _chosen(dstatic_ptrs, member)
        _reduce_du(partial_ptr, dbasis_ptr, dstatic_ptr, program * DU_ELEMENTS, chunks, D, R, DU_ELEMENTS, DU_AHEAD)


@triton.jit
def _reduce_dz(
    partial_ptr,
    dz_ptr,
    first_row,
    shape,
    blocks,
    plane,
    stride,
    R: tl.constexpr,
    ROWS: tl.constexpr,
):
    T, L, sequence_chunks, chunks = shape
    # In the order of the partial sums: they are most of the bytes. Only scalars are divided in 64 bits: it is slow.
    row = first_row + tl.arange(0, ROWS)
    pair_of_chunk = (first_row // 16 % (L // 2)).to(tl.int32) + tl.arange(0, ROWS) // 16
    chunk = (first_row // (8 * L)).to(tl.int32) + pair_of_chunk // (L // 2)
    step = pair_of_chunk % (L // 2) * 2 + row.to(tl.int32) // 8 % 2
    run = row.to(tl.int32) % 8
    token = chunk % sequence_chunks * (8 * L) + run * L + step
    output = (chunk // sequence_chunks).to(tl.int64) * T + token
    rank = tl.arange(0, 16)
    pointers = partial_ptr + row[:, None] * 16 + rank[None, :]
    mask = ((chunk < chunks) & (token < T))[:, None] & (rank < R)[None, :]
    total = tl.zeros((ROWS, 16), tl.float32)
    for block in range(0, blocks, DZ_AHEAD):
        for ahead in tl.static_range(DZ_AHEAD):
            total += tl.load(pointers + ahead * plane, mask=mask & (block + ahead < blocks), other=0.0)
        pointers += DZ_AHEAD * plane
    tl.store(dz_ptr + output[:, None] * stride + rank[None, :], total.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _reduce_du(
    partial_ptr,
    dbasis_ptr,
    dstatic_ptr,
    first,
    chunks,
    D,
    R: tl.constexpr,
    ELEMENTS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    element = first + tl.arange(0, ELEMENTS)
    total = tl.zeros((ELEMENTS,), tl.float32)
    # Several loads at once, or the sum would wait for each in turn.
    for chunk in range(0, chunks, AHEAD):
        for ahead in tl.static_range(AHEAD):
            pointers = partial_ptr + (chunk + ahead) * (64 * D).to(tl.int64) + element
            total += tl.load(pointers, mask=chunk + ahead < chunks, other=0.0)
    # 4 * D is a multiple of ELEMENTS: a program's elements are of one rank.
    if first < R * 4 * D:
        tl.store(dbasis_ptr + element, total.to(dbasis_ptr.dtype.element_ty))
    elif dstatic_ptr is not None:
        tl.store(dstatic_ptr + (element - R * 4 * D), total.to(dstatic_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "z_stride", "z_member_stride", "rotary_tokens"])
def lowrank_state_gradient_kernel(
    dy_ptrs,
    coefficients_ptr,
    basis_ptrs,
    static_ptrs,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    dstate_ptrs,
    channels,
    T,
    z_stride,
    z_member_stride,
    rotary_tokens,
    R: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dstate[3 + t - w] += k_w[t] * dy[t] for t < w. Grid (sum of channels / BLOCK, B).

    By itself, since it takes three tokens of each sequence and the backward's loop has no register to spare.
    """
    member, first = _located(tl.program_id(0) * BLOCK, channels)
    D = _chosen(channels, member)
    channel = first + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    sequence = batch * T
    coefficients_ptr += member * z_member_stride
    basis_ptr = _chosen(basis_ptrs, member)
    dy_ptr = _chosen(dy_ptrs, member)
    rotated = False
    for i in tl.static_range(len(ROTATED)):
        if ROTATED[i]:
            rotated = rotated | (member == i)
    for row in tl.static_range(3):
        total = tl.zeros((BLOCK,), tl.float32)
        for token in tl.static_range(row + 1):
            reached = token < T
            if positions_ptr is not None:
                reached &= tl.load(positions_ptr + sequence + token, mask=reached, other=0) >= 3 + token - row
            filter = tl.zeros((BLOCK,), tl.float32)
            for rank in tl.static_range(R):
                z = tl.load(coefficients_ptr + (sequence + token) * z_stride + rank, mask=reached, other=0.0)
                filter += z.to(tl.float32) * tl.load(basis_ptr + (rank * 4 + 3 + token - row) * D + channel).to(
                    tl.float32
                )
            if static_ptrs is not None:
                filter += tl.load(_chosen(static_ptrs, member) + (3 + token - row) * D + channel).to(tl.float32)
            source = dy_ptr + (sequence + token) * D
            dy = tl.load(source + channel, mask=reached & (channel < D), other=0.0)
            if HEAD_DIM > 0:
                mask = reached & rotated & (channel < D)
                angle = (batch * rotary_tokens + token) * HEAD_DIM + channel % (HEAD_DIM // 2)
                cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
                sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
                second = channel % HEAD_DIM >= HEAD_DIM // 2
                partner = channel + tl.where(second, -(HEAD_DIM // 2), HEAD_DIM // 2)
                turned = tl.load(source + partner, mask=mask, other=0.0) * tl.where(second, -sin, sin)
                # Rounded as in `lowrank_gluon_rotary`.
                kept = (dy * cos).to(dy.dtype).to(tl.float32)
                dy = tl.where(rotated, (kept + turned.to(dy.dtype).to(tl.float32)).to(dy.dtype), dy)
            total += filter * dy.to(tl.float32)
        dstate_ptr = _chosen(dstate_ptrs, member)
        pointers = dstate_ptr + batch * (3 * D) + row * D + channel
        tl.store(pointers, total.to(dstate_ptr.dtype.element_ty))
