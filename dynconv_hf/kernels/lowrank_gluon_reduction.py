"""What `lowrank_gluon_backward` leaves: its partial sums, added in a fixed order, and the gradient of the state."""

import triton
import triton.language as tl

__all__ = ["DU_AHEAD", "DU_ELEMENTS", "DZ_ROWS", "lowrank_reduction_kernel", "lowrank_state_gradient_kernel"]

DZ_ROWS = 64
DU_ELEMENTS = 512
DU_AHEAD = 16


@triton.jit(do_not_specialize=["T", "L", "sequence_chunks", "chunks", "dz_programs"])
def lowrank_reduction_kernel(
    dz_partial_ptr,
    du_partial_ptr,
    dz_ptr,
    dbasis_ptr,
    dstatic_ptr,
    T,
    L,
    sequence_chunks,
    chunks,
    dz_programs,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
    DZ_ROWS: tl.constexpr,
    DU_ELEMENTS: tl.constexpr,
    DU_AHEAD: tl.constexpr,
):
    """Grid (dz_programs + du_programs,), the two kinds of sums one after the other in one launch.

    dz_partial: (BLOCKS, chunks, L / 2, 16, 16), a pair's 16 rows being 8 * h + g for token h of run g.
    du_partial: (chunks, 16, 4, D).
    """
    program = tl.program_id(0)
    if program < dz_programs:
        first_row = program.to(tl.int64) * DZ_ROWS
        _reduce_dz(dz_partial_ptr, dz_ptr, first_row, T, L, sequence_chunks, chunks, R, BLOCKS, DZ_ROWS)
    else:
        first = (program - dz_programs) * DU_ELEMENTS
        _reduce_du(du_partial_ptr, dbasis_ptr, dstatic_ptr, first, chunks, D, R, DU_ELEMENTS, DU_AHEAD)


@triton.jit
def _reduce_dz(
    partial_ptr,
    dz_ptr,
    first_row,
    T,
    L,
    sequence_chunks,
    chunks,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):
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
    plane = chunks.to(tl.int64) * L * 128
    total = tl.zeros((ROWS, 16), tl.float32)
    for block in tl.static_range(BLOCKS):
        total += tl.load(pointers + block * plane, mask=mask, other=0.0)
    tl.store(dz_ptr + output[:, None] * R + rank[None, :], total.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _reduce_du(
    partial_ptr,
    dbasis_ptr,
    dstatic_ptr,
    first,
    chunks,
    D: tl.constexpr,
    R: tl.constexpr,
    ELEMENTS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    element = first + tl.arange(0, ELEMENTS)
    total = tl.zeros((ELEMENTS,), tl.float32)
    # Several loads at once, or the sum would wait for each in turn.
    for chunk in range(0, chunks, AHEAD):
        for ahead in tl.static_range(AHEAD):
            pointers = partial_ptr + (chunk + ahead).to(tl.int64) * (64 * D) + element
            total += tl.load(pointers, mask=chunk + ahead < chunks, other=0.0)
    # 4 * D is a multiple of ELEMENTS: a program's elements are of one rank.
    if first < R * 4 * D:
        tl.store(dbasis_ptr + element, total.to(dbasis_ptr.dtype.element_ty))
    elif dstatic_ptr is not None:
        tl.store(dstatic_ptr + (element - R * 4 * D), total.to(dstatic_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def lowrank_state_gradient_kernel(
    dy_ptr,
    coefficients_ptr,
    basis_ptr,
    static_ptr,
    positions_ptr,
    dstate_ptr,
    T,
    D: tl.constexpr,
    R: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dstate[3 + t - w] += k_w[t] * dy[t] for t < w. Grid (D / BLOCK, B).

    By itself, since it takes three tokens of each sequence and the backward's loop has no register to spare.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.program_id(1).to(tl.int64) * T
    for row in tl.static_range(3):
        total = tl.zeros((BLOCK,), tl.float32)
        for token in tl.static_range(row + 1):
            reached = token < T
            if positions_ptr is not None:
                reached &= tl.load(positions_ptr + sequence + token, mask=reached, other=0) >= 3 + token - row
            filter = tl.zeros((BLOCK,), tl.float32)
            for rank in tl.static_range(R):
                z = tl.load(coefficients_ptr + (sequence + token) * Z_STRIDE + rank, mask=reached, other=0.0)
                filter += z.to(tl.float32) * tl.load(basis_ptr + (rank * 4 + 3 + token - row) * D + channel).to(
                    tl.float32
                )
            if static_ptr is not None:
                filter += tl.load(static_ptr + (3 + token - row) * D + channel).to(tl.float32)
            dy = tl.load(dy_ptr + (sequence + token) * D + channel, mask=reached & (channel < D), other=0.0)
            total += filter * dy.to(tl.float32)
        pointers = dstate_ptr + tl.program_id(1).to(tl.int64) * (3 * D) + row * D + channel
        tl.store(pointers, total.to(dstate_ptr.dtype.element_ty))
