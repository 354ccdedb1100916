"""The decode step as a PyTorch operator, which changes the states in place; see `decode` for the kernel.

Importing this module does not import Triton: the kernel is loaded when the operator first runs.
"""

import torch

from .namespace import NAMESPACE as _NAMESPACE

__all__ = ["MAX_GROUP", "decode_step"]

# The kernel has so many slots for tensors.
MAX_GROUP = 3
_SCHEMA = """decode_step(
    Tensor hidden_states, Tensor[] xs, Tensor[] filter_weights, Tensor[] bases, Tensor[] static_filters,
    Tensor(a!)[] states, Tensor? positions, Tensor? cos, Tensor? sin, SymInt head_dim, bool[] rotated, bool residual
) -> (Tensor, Tensor, Tensor)"""
# flexible_layout: any strides will do. Where they are laid down, torch.compile copies what is not in memory yet, as
# cos and sin, anew for every layer.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


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
    return getattr(torch.ops, _NAMESPACE).decode_step.default(
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


def _run(hidden_states, xs, filter_weights, bases, static_filters, states, *others):
    from .decode import decode_step

    outputs = decode_step(hidden_states, xs, filter_weights, bases, static_filters, states, *others)
    for state in states:
        if not state.is_inference():
            # Autograd then finds that what it kept has changed.
            torch.autograd.graph.increment_version(state)
    return _fill_up(outputs, xs[0])


def _run_fake(hidden_states, xs, *others):
    return _fill_up([x.new_empty(x.shape) for x in xs], xs[0])


def _fill_up(outputs: list[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (*outputs, *[x.new_empty(0) for _ in range(MAX_GROUP - len(outputs))])


def _define() -> torch.library.Library:
    """Not a `custom_op`, which takes more time than the kernel: Python runs before and after each one."""
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    library.define(_SCHEMA, tags=_TAGS)
    library.impl("decode_step", _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::decode_step", _run_fake, lib=library)
    return library


# Defined once, also where this module is loaded again.
_LIBRARY = globals().get("_LIBRARY") or _define()
