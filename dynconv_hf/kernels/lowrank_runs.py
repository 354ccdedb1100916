"""What the low-rank kernels for half precision share: sequences walked in runs, and the loads of a step.

The rows of a matrix-unit tile need not follow each other in time. A program owns 8 runs of `length` consecutive
tokens each, and all runs step forward together, two tokens at a time: the 16 rows of a tile are 2 tokens of each run.
Each thread so meets consecutive tokens of one run, and x some steps earlier is what it held some steps ago: no copy
of x is read or moved. Channels are numbered so that the filters come out of the matrix unit in the layout in which x
and dy are loaded: reshapes and permutations of tiles only rename registers.

Shape suffixes: G runs, V groups of 32 channels, C channels of a group, M rows of a tile (token of the pair, run),
R ranks with the static filter.
"""

import torch
import triton
import triton.language as tl

__all__ = [
    "GROUP",
    "MOST_LENGTH",
    "MOST_STRIDE",
    "RANKS",
    "RUNS",
    "aligned_rows",
    "basis_columns",
    "fits_offsets",
    "load_pair_coefficients",
    "load_token",
    "load_token_positions",
    "run_offsets",
    "split_tokens",
    "store_token",
    "where_counts",
]

# A tile of the matrix units: 2 tokens of each run by ranks, the static filter's among them. A warp's channels.
RUNS, RANKS, GROUP = 8, 16, 32
# Tokens of the longest run. Within a chunk of runs, tokens are found by 32-bit offsets.
MOST_LENGTH = 256
MOST_STRIDE = 2**31 // (RUNS * MOST_LENGTH)


def fits_offsets(x: torch.Tensor, coefficients: torch.Tensor) -> bool:
    """Whether 32 bits hold the offsets of x within a chunk and those of a sequence's coefficients."""
    tokens, rank = coefficients.shape[1:]
    return x.stride(1) < MOST_STRIDE and tokens * max(coefficients.stride(1), rank) < 2**31


def aligned_rows(x: torch.Tensor) -> bool:
    """Whether the compiler sees that rows are aligned: else there are more offsets than long loops have registers."""
    return x.shape[-1] % 16 == 0


@triton.jit
def run_offsets(row_G, d_VC):
    """The offset of each element of a (V, G, C) tile, from that of each run's row."""
    # The hint makes Triton give the lanes of a warp to the runs, as the matrix units do, and not to the groups.
    return tl.max_contiguous(row_G[None, :, None] + d_VC[:, None, :], (1, 2, 32))


@triton.jit
def load_pair_coefficients(z_ptr, stride_t, t, length, T, RANK: tl.constexpr):
    """z at tokens t and t + 1 of each run. The static filter's is 1; what is past T is not stored, or meets dy = 0."""
    m_M, r_R = tl.arange(0, 16), tl.arange(0, 16)
    # Past the end the last row stands in: cheaper than a mask for each row.
    row_M = tl.minimum(t + (m_M % 8) * length + m_M // 8, T - 1)
    return tl.load(z_ptr + (row_M[:, None] * stride_t + r_R[None, :]), mask=(r_R < RANK)[None, :], other=1.0)


@triton.jit
def basis_columns(u_RJ, GROUPS: tl.constexpr):
    """Channels 8q + 2j + e of each group in the order (j, group, q, e): see `split_tokens`."""
    return u_RJ.reshape(16, GROUPS, 4, 4, 2).permute(0, 3, 1, 2, 4).reshape(16, GROUPS * 32)


@triton.jit
def split_tokens(k_MN, GROUPS: tl.constexpr):
    """A product with `basis_columns`, (token, run, j, group, q, e), becomes a (V, G, C) tile for each token of the
    pair, in the layout in which x is loaded."""
    return k_MN.reshape(2, 8, 4, GROUPS, 4, 2).permute(3, 1, 4, 2, 5, 0).reshape(GROUPS, 8, 32, 2).split()


@triton.jit
def load_token(x_ptr, t, row_G, offset_VGC, keep_VGC, T):
    """x at token t of each run; 0 outside the sequence."""
    inside_G = (t + row_G >= 0) & (t + row_G < T)
    return tl.load(x_ptr + offset_VGC, mask=inside_G[None, :, None] & keep_VGC, other=0.0)


@triton.jit
def load_token_positions(positions_ptr, stride_t, t, row_G, T, HAS_POSITIONS: tl.constexpr):
    position_G = row_G
    if HAS_POSITIONS:
        row = (t + row_G).to(tl.int64)
        position_G = tl.load(positions_ptr + row * stride_t, mask=t + row_G < T, other=-1).to(tl.int32)
    return position_G


@triton.jit
def where_counts(position_G, w: tl.constexpr, term_VGC, HAS_POSITIONS: tl.constexpr):
    """What tap w of the tokens at these positions adds. A choice, not a product: the term may be inf or nan."""
    if HAS_POSITIONS:
        term_VGC = tl.where((position_G >= w)[None, :, None], term_VGC, 0.0)
    return term_VGC


@triton.jit
def store_token(y_ptr, y_VGC, t, row_G, offset_VGC, keep_VGC, written, T):
    mask_VGC = (written & (t + row_G < T))[None, :, None] & keep_VGC
    tl.store(y_ptr + offset_VGC, y_VGC.to(y_ptr.dtype.element_ty), mask=mask_VGC)
