"""The Triton kernels as PyTorch operators: fake implementations for torch.compile, autograd, any device Triton serves.

Importing this module does not import Triton: the kernels are loaded when an operator first runs.

A module of kernels gives `forward(x, *filters, residual, positions, initial_state) -> y` and
`backward(dy, x, <the same>) -> gradients of x, the filters and the initial state`, None for what was not given. One
that does not serve every input also gives `covers(x, <the same>) -> str | None`: None, or what it does not serve.
For several tensors at once they are `forward_group`, `backward_group` and `covers_group`, which take lists, of None
where nothing is given.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from .namespace import NAMESPACE as _NAMESPACE
from .reference import headwise_reference, lowrank_group_reference, lowrank_reference, static_reference
from .rotary import Rotary
from .second_derivatives import gradients_of_gradients

__all__ = [
    "Kernels",
    "headwise",
    "lowrank",
    "lowrank_group",
    "lowrank_group_kernels",
    "lowrank_kernels",
    "static",
]


class Kernels(NamedTuple):
    """A set of kernels: its name, made only when asked for, and what launches them."""

    name: Callable[[], str]
    forward: Callable[..., Any]
    backward: Callable[..., tuple[Any, ...]]


def _gluon_name() -> str:
    return "lowrank_gluon"


def lowrank_kernels(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> tuple[Kernels, str]:
    """The fastest kernels that serve these inputs, and why not faster ones."""
    from .lowrank_gluon import backward, covers, forward

    reason = covers(x, coefficients, basis, static_filter, positions, initial_state)
    if reason is None:
        return Kernels(_gluon_name, forward, backward), ""
    from .lowrank import backward, forward, launched

    name = partial(launched, x, coefficients, basis, static_filter, initial_state)
    return Kernels(name, forward, backward), f"not lowrank_gluon: {reason}"


def lowrank_group_kernels(
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor | None],
    positions: torch.Tensor | None,
    initial_states: Sequence[torch.Tensor | None],
    rotary: Rotary | None,
) -> tuple[Kernels, str]:
    """The fastest kernels that serve a group of tensors, and why not faster ones."""
    from .lowrank_gluon import backward_group, covers_group, forward_group

    reason = covers_group(xs, coefficients, bases, static_filters, positions, initial_states, rotary)
    if reason is None:
        return Kernels(_gluon_name, forward_group, backward_group), ""
    from .lowrank_one_by_one import backward_group, forward_group, launched

    name = partial(launched, xs, coefficients, bases, static_filters, positions, initial_states)
    return Kernels(name, forward_group, backward_group), f"not lowrank_gluon: {reason}"


def _direct_kernels() -> Kernels:
    from .direct import backward, forward

    return Kernels(lambda: "direct", forward, backward)


def _empty_for_none(gradients: Sequence[torch.Tensor | None], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """An operator returns tensors only."""
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_gradients(*inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    x = inputs[0]
    return _empty_for_none([None if a is None else a.new_empty(a.shape) for a in inputs], x)


def _wanted(
    ctx: torch.autograd.function.FunctionCtx,
    gradients: Sequence[torch.Tensor],
    slots: Sequence[int],
    inputs: int,
) -> tuple[torch.Tensor | None, ...]:
    """The operator's gradients, each in its input's slot, where that input wants one."""
    by_slot = dict(zip(slots, gradients, strict=True))
    return tuple(by_slot[slot] if slot in by_slot and ctx.needs_input_grad[slot] else None for slot in range(inputs))


@torch.library.custom_op(f"{_NAMESPACE}::lowrank", mutates_args=())
def lowrank(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> torch.Tensor:
    kernels, _ = lowrank_kernels(x, coefficients, basis, static_filter, positions, initial_state)
    return kernels.forward(x, coefficients, basis, static_filter, residual, positions, initial_state)


@torch.library.custom_op(f"{_NAMESPACE}::lowrank_backward", mutates_args=())
def lowrank_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels, _ = lowrank_kernels(x, coefficients, basis, static_filter, positions, initial_state)
    gradients = kernels.backward(dy, x, coefficients, basis, static_filter, residual, positions, initial_state)
    return _empty_for_none(gradients, x)


@lowrank.register_fake
def _(x, coefficients, basis, static_filter, residual, positions, initial_state):
    return x.new_empty(x.shape)


@lowrank_backward.register_fake
def _(dy, x, coefficients, basis, static_filter, residual, positions, initial_state):
    return _fake_gradients(x, coefficients, basis, static_filter, initial_state)


def _lowrank_setup(ctx, inputs, output):
    x, coefficients, basis, static_filter, ctx.residual, positions, initial_state = inputs
    ctx.save_for_backward(x, coefficients, basis, static_filter, positions, initial_state)


def _lowrank_gradients(ctx, dy):
    x, coefficients, basis, static_filter, positions, initial_state = ctx.saved_tensors
    gradients = lowrank_backward(dy, x, coefficients, basis, static_filter, ctx.residual, positions, initial_state)
    return _wanted(ctx, gradients, (0, 1, 2, 3, 6), 7)


lowrank.register_autograd(_lowrank_gradients, setup_context=_lowrank_setup)


def _lowrank_backward_setup(ctx, inputs, output):
    dy, x, coefficients, basis, static_filter, ctx.residual, positions, initial_state = inputs
    ctx.save_for_backward(dy, x, coefficients, basis, static_filter, positions, initial_state)


def _lowrank_second_gradients(ctx, *cotangents):
    dy, x, coefficients, basis, static_filter, positions, initial_state = ctx.saved_tensors

    def convolve(x, coefficients, basis, static_filter, initial_state):
        return lowrank_reference(
            x,
            coefficients,
            basis,
            static_filter_WD=static_filter,
            residual=ctx.residual,
            positions_BT=positions,
            initial_state_BSD=initial_state,
        )[0]

    inputs = (x, coefficients, basis, static_filter, initial_state)
    ddy, gradients = gradients_of_gradients(convolve, dy, inputs, cotangents)
    return _wanted(ctx, (ddy, *gradients), (0, 1, 2, 3, 4, 7), 8)


lowrank_backward.register_autograd(_lowrank_second_gradients, setup_context=_lowrank_backward_setup)


# Operators know lists of tensors, but none that may be missing: an empty one stands for None.
@torch.library.custom_op(f"{_NAMESPACE}::lowrank_group", mutates_args=())
def lowrank_group(
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor],
    residual: bool,
    positions: torch.Tensor | None,
    initial_states: Sequence[torch.Tensor],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    head_dim: int,
    rotated: Sequence[bool],
) -> list[torch.Tensor]:
    rotary = None if cos is None else Rotary(cos, sin, head_dim, tuple(rotated))
    filters = (coefficients, bases, static_filters or [None] * len(xs))
    rest = (positions, initial_states or [None] * len(xs), rotary)
    kernels, _ = lowrank_group_kernels(xs, *filters, *rest)
    return kernels.forward(xs, *filters, residual, *rest)


@torch.library.custom_op(f"{_NAMESPACE}::lowrank_group_backward", mutates_args=())
def lowrank_group_backward(
    dys: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Sequence[torch.Tensor],
    residual: bool,
    positions: torch.Tensor | None,
    initial_states: Sequence[torch.Tensor],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    head_dim: int,
    rotated: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients of xs, bases, static_filters, initial_states and coefficients, in a row."""
    rotary = None if cos is None else Rotary(cos, sin, head_dim, tuple(rotated))
    filters = (coefficients, bases, static_filters or [None] * len(xs))
    rest = (positions, initial_states or [None] * len(xs), rotary)
    kernels, _ = lowrank_group_kernels(xs, *filters, *rest)
    dxs, dcoefficients, dbases, dstatics, dstates = kernels.backward(dys, xs, *filters, residual, *rest)
    return [*dxs, *dbases, *dstatics[: len(static_filters)], *dstates[: len(initial_states)], dcoefficients]


@lowrank_group.register_fake
def _(xs, coefficients, bases, static_filters, residual, positions, initial_states, cos, sin, head_dim, rotated):
    return [x.new_empty(x.shape) for x in xs]


@lowrank_group_backward.register_fake
def _(dys, xs, coefficients, bases, static_filters, residual, positions, initial_states, cos, sin, head_dim, rotated):
    return [a.new_empty(a.shape) for a in (*xs, *bases, *static_filters, *initial_states, coefficients)]


def _lowrank_group_setup(ctx, inputs, output):
    xs, coefficients, bases, static_filters, ctx.residual, positions, initial_states, *rotary = inputs
    cos, sin, ctx.head_dim, ctx.rotated = rotary
    ctx.sizes = (len(xs), len(bases), len(static_filters), len(initial_states))
    ctx.save_for_backward(*xs, *bases, *static_filters, *initial_states, coefficients, positions, cos, sin)


def _lowrank_group_gradients(ctx, dys):
    lists, (coefficients, positions, cos, sin) = _cut(ctx.saved_tensors, ctx.sizes)
    xs, bases, static_filters, initial_states = lists
    filters = (coefficients, bases, static_filters)
    rotary = (cos, sin, ctx.head_dim, ctx.rotated)
    try:
        gradients = lowrank_group_backward(dys, xs, *filters, ctx.residual, positions, initial_states, *rotary)
    except RuntimeError as error:
        # torch has no rule of its own for operators on lists, and its error would name this operator alone.
        if "Batching rule not implemented" not in str(error):
            raise
        raise ValueError(
            "the Triton kernels of a group of convolutions take one gradient of the outputs at a time, not a batch "
            "(is_grads_batched=True, vectorize=True): set DYNCONV_IMPL=reference, or give them one by one"
        ) from error
    lists, (dcoefficients,) = _cut(gradients, ctx.sizes)
    needs = ctx.needs_input_grad
    dxs, dbases, dstatics, dstates = (
        [gradient if wanted else None for gradient, wanted in zip(found, needs[slot], strict=True)]
        for found, slot in zip(lists, (0, 2, 3, 6), strict=True)
    )
    dcoefficients = dcoefficients if needs[1] else None
    return dxs, dcoefficients, dbases, dstatics, None, None, dstates, None, None, None, None


def _cut(
    tensors: Sequence[torch.Tensor | None], sizes: Sequence[int]
) -> tuple[list[list[torch.Tensor]], list[torch.Tensor | None]]:
    """Lists of the given sizes from the front, and what is left."""
    lists, start = [], 0
    for size in sizes:
        lists.append(list(tensors[start : start + size]))
        start += size
    return lists, list(tensors[start:])


lowrank_group.register_autograd(_lowrank_group_gradients, setup_context=_lowrank_group_setup)


def _lowrank_group_backward_setup(ctx, inputs, output):
    dys, xs, coefficients, bases, static_filters, ctx.residual, positions, initial_states, *rotary = inputs
    cos, sin, ctx.head_dim, ctx.rotated = rotary
    ctx.sizes = (len(dys), len(xs), len(bases), len(static_filters), len(initial_states))
    ctx.save_for_backward(*dys, *xs, *bases, *static_filters, *initial_states, coefficients, positions, cos, sin)


def _lowrank_group_second_gradients(ctx, cotangents):
    (dys, *lists), (coefficients, positions, cos, sin) = _cut(ctx.saved_tensors, ctx.sizes)
    rotary = None if cos is None else Rotary(cos, sin, ctx.head_dim, tuple(ctx.rotated))

    def convolve(*inputs):
        (xs, bases, static_filters, initial_states), (coefficients,) = _cut(inputs, ctx.sizes[1:])
        return lowrank_group_reference(
            xs,
            coefficients,
            bases,
            static_filters,
            residual=ctx.residual,
            positions_BT=positions,
            initial_states=initial_states,
            rotary=rotary,
        )

    inputs = (*(tensor for tensors in lists for tensor in tensors), coefficients)
    ddys, gradients = gradients_of_gradients(convolve, dys, inputs, cotangents)
    found, (dcoefficients,) = _cut(gradients, ctx.sizes[1:])
    needs = ctx.needs_input_grad
    ddys, dxs, dbases, dstatics, dstates = (
        [gradient if wanted else None for gradient, wanted in zip(gradients, needs[slot], strict=True)]
        for gradients, slot in zip((ddys, *found), (0, 1, 3, 4, 7), strict=True)
    )
    dcoefficients = dcoefficients if needs[2] else None
    return ddys, dxs, dcoefficients, dbases, dstatics, None, None, dstates, None, None, None, None


lowrank_group_backward.register_autograd(_lowrank_group_second_gradients, setup_context=_lowrank_group_backward_setup)


@torch.library.custom_op(f"{_NAMESPACE}::headwise", mutates_args=())
def headwise(
    x: torch.Tensor,
    filters: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> torch.Tensor:
    return _direct_kernels().forward(x, filters, static_filter, residual, positions, initial_state)


@torch.library.custom_op(f"{_NAMESPACE}::headwise_backward", mutates_args=())
def headwise_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    filters: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = (x, filters, static_filter, residual, positions, initial_state)
    return _empty_for_none(_direct_kernels().backward(dy, *inputs), x)


@headwise.register_fake
def _(x, filters, static_filter, residual, positions, initial_state):
    return x.new_empty(x.shape)


@headwise_backward.register_fake
def _(dy, x, filters, static_filter, residual, positions, initial_state):
    return _fake_gradients(x, filters, static_filter, initial_state)


def _headwise_setup(ctx, inputs, output):
    x, filters, static_filter, ctx.residual, positions, initial_state = inputs
    ctx.save_for_backward(x, filters, static_filter, positions, initial_state)


def _headwise_gradients(ctx, dy):
    x, filters, static_filter, positions, initial_state = ctx.saved_tensors
    gradients = headwise_backward(dy, x, filters, static_filter, ctx.residual, positions, initial_state)
    return _wanted(ctx, gradients, (0, 1, 2, 5), 6)


headwise.register_autograd(_headwise_gradients, setup_context=_headwise_setup)


def _headwise_backward_setup(ctx, inputs, output):
    dy, x, filters, static_filter, ctx.residual, positions, initial_state = inputs
    ctx.save_for_backward(dy, x, filters, static_filter, positions, initial_state)


def _headwise_second_gradients(ctx, *cotangents):
    dy, x, filters, static_filter, positions, initial_state = ctx.saved_tensors

    def convolve(x, filters, static_filter, initial_state):
        return headwise_reference(
            x,
            filters,
            static_filter_WD=static_filter,
            residual=ctx.residual,
            positions_BT=positions,
            initial_state_BSD=initial_state,
        )[0]

    inputs = (x, filters, static_filter, initial_state)
    ddy, gradients = gradients_of_gradients(convolve, dy, inputs, cotangents)
    return _wanted(ctx, (ddy, *gradients), (0, 1, 2, 3, 6), 7)


headwise_backward.register_autograd(_headwise_second_gradients, setup_context=_headwise_backward_setup)


@torch.library.custom_op(f"{_NAMESPACE}::static", mutates_args=())
def static(
    x: torch.Tensor,
    static_filter: torch.Tensor,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> torch.Tensor:
    return _direct_kernels().forward(x, None, static_filter, residual, positions, initial_state)


@torch.library.custom_op(f"{_NAMESPACE}::static_backward", mutates_args=())
def static_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    static_filter: torch.Tensor,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, _, dstatic, dstate = _direct_kernels().backward(dy, x, None, static_filter, residual, positions, initial_state)
    return _empty_for_none((dx, dstatic, dstate), x)


@static.register_fake
def _(x, static_filter, residual, positions, initial_state):
    return x.new_empty(x.shape)


@static_backward.register_fake
def _(dy, x, static_filter, residual, positions, initial_state):
    return _fake_gradients(x, static_filter, initial_state)


def _static_setup(ctx, inputs, output):
    x, static_filter, ctx.residual, positions, initial_state = inputs
    ctx.save_for_backward(x, static_filter, positions, initial_state)


def _static_gradients(ctx, dy):
    x, static_filter, positions, initial_state = ctx.saved_tensors
    gradients = static_backward(dy, x, static_filter, ctx.residual, positions, initial_state)
    return _wanted(ctx, gradients, (0, 1, 4), 5)


static.register_autograd(_static_gradients, setup_context=_static_setup)


def _static_backward_setup(ctx, inputs, output):
    dy, x, static_filter, ctx.residual, positions, initial_state = inputs
    ctx.save_for_backward(dy, x, static_filter, positions, initial_state)


def _static_second_gradients(ctx, *cotangents):
    dy, x, static_filter, positions, initial_state = ctx.saved_tensors

    def convolve(x, static_filter, initial_state):
        return static_reference(
            x, static_filter, residual=ctx.residual, positions_BT=positions, initial_state_BSD=initial_state
        )[0]

    ddy, gradients = gradients_of_gradients(convolve, dy, (x, static_filter, initial_state), cotangents)
    return _wanted(ctx, (ddy, *gradients), (0, 1, 2, 5), 6)


static_backward.register_autograd(_static_second_gradients, setup_context=_static_backward_setup)
