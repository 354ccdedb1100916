"""The decode step as a PyTorch operator, which changes the states in place; see `decode` for the kernel.

Importing this module does not import Triton: the kernel is loaded when the operator first runs.
"""

import inspect
import re

import torch

__all__ = ["MAX_GROUP", "decode_step"]

# The kernel has so many slots for tensors.
MAX_GROUP = 3

# As in `ops`: copies of this code must not take the place of each other's operators.
_NAMESPACE = re.sub(r"\W", "_", __package__)


# Any strides will do. Where they are laid down, torch.compile copies what is not in memory yet, as cos and sin, anew
# for every layer. Older PyTorch has no tags to say so with.
_HAS_TAGS = "tags" in inspect.signature(torch.library.custom_op).parameters
_OPTIONS = {"tags": (torch.Tag.flexible_layout,)} if _HAS_TAGS else {}


@torch.library.custom_op(f"{_NAMESPACE}::decode_step", mutates_args=("states",), **_OPTIONS)
def decode_step(
    hidden_states: torch.Tensor,
    xs: list[torch.Tensor],
    filter_weights: list[torch.Tensor],
    bases: list[torch.Tensor],
    static_filters: list[torch.Tensor],
    states: list[torch.Tensor],
    positions: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    head_dim: int,
    rotated: list[bool],
    residual: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token of the low-rank convolutions of a group of one to three tensors, for each sequence.

    Args:
        hidden_states: (B, 1, hidden), what makes the filters.
        xs: (B, 1, D) each, with a D of its own and one dtype: float32, bfloat16 or float16.
        filter_weights: (R, hidden) each; the coefficients have the weights' dtype.
        bases: (R, W, D) each.
        static_filters: (W, D) each, or none at all.
        states: (B, D, W - 1) each, contiguous, of x's dtype: the inputs just before x, oldest first. They are
            shifted in place.
        positions: (B, 1) or (1, 1), integer; tap w counts only where `positions >= w`. None: every tap does.
        cos, sin: (B, 1, rotary_dim) or (1, 1, rotary_dim), contiguous, of x's dtype, the second half repeating the
            first, for RoPE after the convolution, which turns the first `rotary_dim` (even) channels of each head;
            None: no RoPE.
        head_dim: the channels of a head, which divide D where RoPE turns the tensor; not read without RoPE.
        rotated: for each tensor, whether RoPE turns it.
        residual: add x to the output.

    Returns:
        The outputs, (B, 1, D) each, contiguous, in x's dtype; empty tensors for those that the group does not have:
        torch.compile knows no operators that change their inputs and return a list.

    Every tensor of a list has the same dtype.
    """
    from .decode import decode_step

    outputs = decode_step(
        hidden_states,
        xs,
        filter_weights,
        bases,
        static_filters,
        states,
        positions,
        cos,
        sin,
        head_dim,
        rotated,
        residual,
    )
    return _fill_up(outputs, xs[0])


@decode_step.register_fake
def _(hidden_states, xs, *others):
    return _fill_up([x.new_empty(x.shape) for x in xs], xs[0])


def _fill_up(outputs: list[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (*outputs, *[x.new_empty(0) for _ in range(MAX_GROUP - len(outputs))])
