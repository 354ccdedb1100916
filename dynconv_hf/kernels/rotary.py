"""Rotary position embedding (RoPE) of (B, T, D) tensors in eager PyTorch: the specification of what kernels fuse.

The channels are heads side by side, D = heads * head_dim. The first rotary_dim channels of each head are rotated, and
any beyond pass through. Products and sums are in the tensor's dtype, one rounding each, which is transformers'
`apply_rotary_pos_emb` to the last bit; cos and sin come in ready, whatever scaling they were made with.
"""

from typing import NamedTuple

import torch

__all__ = ["Rotary", "rotate", "rotate_back"]


class Rotary(NamedTuple):
    """What rotates some tensors of a group: cos and sin (B or 1, T, rotary_dim), and which tensors.

    The second half of cos and sin repeats the first, as in transformers: kernels may read one of them.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    head_dim: int
    rotated: tuple[bool, ...]


def rotate(x_BTD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """x * cos + rotate_half(x) * sin, where rotate_half takes the halves (a, b) of a head to (-b, a)."""

    def turned(head: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = head.chunk(2, dim=-1)
        return head * cos + torch.cat((-second, first), dim=-1) * sin

    return _each_head(turned, x_BTD, rotary)


def rotate_back(dy_BTD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The transpose of `rotate`: the gradient of its input, given that of its output."""

    def turned_back(head: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = (head * sin).chunk(2, dim=-1)
        return head * cos + torch.cat((second, -first), dim=-1)

    return _each_head(turned_back, dy_BTD, rotary)


def _each_head(turn, x_BTD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    heads_BTHP = x_BTD.unflatten(-1, (-1, rotary.head_dim))
    rotary_dim = rotary.cos.shape[-1]
    turned = turn(heads_BTHP[..., :rotary_dim], rotary.cos.unsqueeze(2), rotary.sin.unsqueeze(2))
    if rotary_dim < rotary.head_dim:
        turned = torch.cat((turned, heads_BTHP[..., rotary_dim:]), dim=-1)
    return turned.flatten(-2)
