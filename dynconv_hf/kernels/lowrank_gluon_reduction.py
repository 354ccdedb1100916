"""Adds the partial sums that `lowrank_gluon_backward` leaves, in a fixed order: the same bits in every run."""

import triton
import triton.language as tl

__all__ = ["DU_ELEMENTS", "DZ_ROWS", "lowrank_reduction_kernel"]

DZ_ROWS = 32
DU_ELEMENTS = 512


@triton.jit(do_not_specialize=["T", "L", "rows", "sequence_chunks", "chunks", "dz_programs"])
def lowrank_reduction_kernel(
    dz_partial_ptr,
    du_partial_ptr,
    dz_ptr,
    dbasis_ptr,
    dstatic_ptr,
    T,
    L,
    rows,
    sequence_chunks,
    chunks,
    dz_programs,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
    DZ_ROWS: tl.constexpr,
    DU_ELEMENTS: tl.constexpr,
):
    """Grid (dz_programs + du_programs,), the two kinds of sums one after the other in one launch.

    dz_partial: (BLOCKS, chunks, L / 2, 16, 16), a pair's 16 rows being 8 * h + g for token h of run g.
    du_partial: (chunks, 16, 4, D).
    """
    program = tl.program_id(0)
    if program < dz_programs:
        row = program.to(tl.int64) * DZ_ROWS + tl.arange(0, DZ_ROWS)
        token = row % T
        chunk = (row // T) * sequence_chunks + token // (8 * L)
        run = token // L % 8
        step = token % L
        tile_row = (chunk * (L // 2) + step // 2) * 16 + step % 2 * 8 + run
        rank = tl.arange(0, 16)
        pointers = dz_partial_ptr + tile_row[:, None] * 16 + rank[None, :]
        mask = (row < rows)[:, None] & (rank < R)[None, :]
        plane = chunks.to(tl.int64) * L * 128
        total = tl.zeros((DZ_ROWS, 16), tl.float32)
        for block in tl.static_range(BLOCKS):
            total += tl.load(pointers + block * plane, mask=mask, other=0.0)
        tl.store(dz_ptr + row[:, None] * R + rank[None, :], total.to(dz_ptr.dtype.element_ty), mask=mask)
    else:
        first = (program - dz_programs) * DU_ELEMENTS
        element = first + tl.arange(0, DU_ELEMENTS)
        total = tl.zeros((DU_ELEMENTS,), tl.float32)
        # Eight loads at once, or the sum would wait for each in turn.
        for chunk in range(0, chunks, 8):
            for ahead in tl.static_range(8):
                pointers = du_partial_ptr + (chunk + ahead).to(tl.int64) * (64 * D) + element
                total += tl.load(pointers, mask=chunk + ahead < chunks, other=0.0)
        # 4 * D is a multiple of DU_ELEMENTS: a program's elements are of one rank.
        if first < R * 4 * D:
            tl.store(dbasis_ptr + element, total.to(dbasis_ptr.dtype.element_ty))
        else:
            tl.store(dstatic_ptr + (element - R * 4 * D), total.to(dstatic_ptr.dtype.element_ty))
