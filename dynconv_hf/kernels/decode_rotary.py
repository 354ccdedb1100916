"""The channels of a block in pairs that RoPE turns together, for the kernel in `decode`.

Shape suffixes: I tokens, C channels, J half of them.
"""

import triton
import triton.language as tl

__all__ = ["halves", "pair_channels", "turn"]


@triton.jit
def pair_channels(block, c_C, BJ: tl.constexpr, HEAD_HALF: tl.constexpr, ROTARY_HALF: tl.constexpr):
    """The channels at places c_C of a block of BJ pairs: the first ones of the pairs, then the second ones.

    RoPE turns the two of a pair together; what is past RoPE's part of a head is paired in the same way.
    """
    if HEAD_HALF % BJ == 0:
        # Blocks within a head: no division for each channel, and wide loads.
        blocks: tl.constexpr = HEAD_HALF // BJ
        head, first = block // blocks * (2 * HEAD_HALF), block % blocks * BJ
        j_C = first + c_C % BJ
    else:
        pair_C = block * BJ + c_C % BJ
        head, j_C = pair_C // HEAD_HALF * (2 * HEAD_HALF), pair_C % HEAD_HALF
    second_C = c_C // BJ
    if ROTARY_HALF == HEAD_HALF:
        return head + j_C + second_C * HEAD_HALF
    past_C = j_C >= ROTARY_HALF
    j_C += tl.where(past_C, ROTARY_HALF, 0)
    return head + j_C + second_C * tl.where(past_C, HEAD_HALF - ROTARY_HALF, ROTARY_HALF)


@triton.jit
def halves(x_IC, BJ: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x_IC, (x_IC.shape[0], 2, BJ)), 0, 2, 1))


@triton.jit
def turn(x_IJ, partner_IJ, cos_IJ, sin_IJ):
    """RoPE, rounded after every step as PyTorch rounds it."""
    dtype: tl.constexpr = x_IJ.dtype
    kept_IJ = (x_IJ.to(tl.float32) * cos_IJ.to(tl.float32)).to(dtype)
    turned_IJ = (partner_IJ * sin_IJ.to(tl.float32)).to(dtype)
    return (kept_IJ.to(tl.float32) + turned_IJ.to(tl.float32)).to(dtype)
