"""Which implementation runs: decided here, and told by `describe_implementation`."""

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch.autograd import forward_ad

from . import ops
from .rotary import Rotary

__all__ = [
    "Choice",
    "Implementation",
    "describe_group_implementation",
    "describe_implementation",
    "select_implementation",
]

Implementation = Literal["auto", "triton", "reference"]
_ALLOWED = ("auto", "triton", "reference")
# The first GPUs whose matrix units take bfloat16.
_LEAST_CAPABILITY = (8, 0)
# The first that the kernels are tested with.
_LEAST_TRITON = (3, 6)


def _missing_triton() -> str | None:
    """Why the installed Triton does not do; None where it does. Does not import it."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        found = version("triton")
    except PackageNotFoundError:
        # AMD's builds have another distribution name.
        return None
    if tuple(int(part) for part in found.split(".")[:2]) < _LEAST_TRITON:
        return f"Triton is {found}, and the kernels need {'.'.join(map(str, _LEAST_TRITON))} or newer"
    return None


_MISSING_TRITON = _missing_triton()


class Choice(NamedTuple):
    """An implementation ("triton" or "reference"; in a description also the module of kernels), and why this one."""

    name: str
    reason: str


def describe_implementation(
    x: torch.Tensor,
    coefficients: torch.Tensor | None = None,
    basis: torch.Tensor | None = None,
    *,
    static_filter: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    impl: Implementation = "auto",
) -> Choice:
    """Which implementation a call with these arguments runs, and why.

    Give `coefficients` and `basis` to ask about the low-rank operation, which has several sets of kernels; the other
    operations have one.

    Returns:
        Choice(name, reason): name is "reference", or "triton" and the module of kernels, such as "triton: lowrank";
        two modules, as in "triton: lowrank_half / lowrank", where the gradients' kernels are of another one.

    Raises:
        ValueError: `impl`, or the environment variable DYNCONV_IMPL, asks for what cannot run; as the call would.
    """
    choice = select_implementation(x, impl)
    if choice.name == "reference":
        return choice
    if coefficients is None or basis is None:
        return Choice("triton: direct", choice.reason)
    return _named(choice, *ops.lowrank_kernels(x, coefficients, basis, static_filter, positions, initial_state))


def describe_group_implementation(
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    *,
    static_filters: Sequence[torch.Tensor] | None = None,
    positions: torch.Tensor | None = None,
    initial_states: Sequence[torch.Tensor] | None = None,
    rotary: Rotary | None = None,
    impl: Implementation = "auto",
) -> Choice:
    """Which implementation `lowrank_dynamic_conv1d_group` runs with these arguments, and why.

    Returns:
        Choice(name, reason): name is "reference", "triton: lowrank_gluon" (one launch for the group), or
        "triton: lowrank_one_by_one: " and, for each tensor, the kernels that [`describe_implementation`] names
        (rotations in eager PyTorch).

    Raises:
        ValueError: as for [`describe_implementation`].
    """
    choice = select_implementation(xs[0], impl)
    if choice.name == "reference":
        return choice
    static_filters = static_filters or [None] * len(xs)
    initial_states = initial_states or [None] * len(xs)
    filters = (coefficients, bases, static_filters)
    return _named(choice, *ops.lowrank_group_kernels(xs, *filters, positions, initial_states, rotary))


def _named(choice: Choice, kernels: ops.Kernels, why_not_faster: str) -> Choice:
    return Choice(f"triton: {kernels.name()}", "; ".join(filter(None, (choice.reason, why_not_faster))))


def select_implementation(x: torch.Tensor, impl: str) -> Choice:
    """The implementation for inputs like x; the one place where this is decided."""
    if impl not in _ALLOWED:
        raise ValueError(f"impl must be one of {_ALLOWED}, got {impl!r}")
    source = "impl"
    if impl == "auto":
        impl, source = os.environ.get("DYNCONV_IMPL", "auto"), "the environment variable DYNCONV_IMPL"
        if impl not in _ALLOWED:
            raise ValueError(f"the environment variable DYNCONV_IMPL must be one of {_ALLOWED}, got {impl!r}")
    if impl == "reference":
        return Choice("reference", f"{source} asks for it")
    obstacle = _triton_obstacle(x.device, x.dtype) or _transformed()
    if impl == "triton":
        if obstacle is not None:
            raise ValueError(f"{source} asks for 'triton', which cannot run: {obstacle}")
        return Choice("triton", f"{source} asks for it")
    if obstacle is not None:
        return Choice("reference", obstacle)
    # The interpreter is for tests, which ask for it: it is far slower than eager PyTorch.
    if x.device.type == "cpu":
        return Choice("reference", "x is on the CPU")
    return Choice("triton", f"x is on {x.device.type}, and Triton is installed")


def _transformed() -> str | None:
    """Why the kernels, which PyTorch differentiates backwards only, do not serve the call that asks; None: they do.

    Forward mode would lose their tangents without a word, and torch.func does not take operators of this kind.
    """
    if torch._C._are_functorch_transforms_active():
        return (
            "a transformation of torch.func (grad, jvp, vmap, ...) is active, which the Triton kernels of the "
            "convolution do not serve; DYNCONV_IMPL=reference does"
        )
    if forward_ad._current_level >= 0:
        return (
            "forward-mode differentiation is active, which the Triton kernels of the convolution do not serve; "
            "DYNCONV_IMPL=reference does"
        )
    return None


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run; None where they can."""
    if dtype == torch.float64:
        return "x is float64, which the Triton kernels do not compute in"
    if _MISSING_TRITON is not None:
        return _MISSING_TRITON
    if device.type == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "x is on the CPU, and TRITON_INTERPRET is not 1"
    if device.type != "cuda":
        return f"x is on {device.type}, and the Triton kernels run on cuda"
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability < _LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability}, and the Triton kernels need {_LEAST_CAPABILITY}"
    return None
