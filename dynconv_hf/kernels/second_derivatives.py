"""Derivatives of the kernels' gradients: the formula in eager PyTorch, which has derivatives of any order.

The kernels compute a convolution and its gradients. Who differentiates these gradients (a Hessian-vector product, a
penalty on their norm) gets there what `reference` says, made from the same inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["gradients_of_gradients"]


def gradients_of_gradients(
    convolution: Callable[..., Any],
    dy: Any,
    inputs: Sequence[torch.Tensor | None],
    cotangents: Sequence[torch.Tensor | None],
) -> tuple[Any, list[torch.Tensor | None]]:
    """The backward pass of the backward pass.

    Args:
        convolution: takes `inputs`, and returns the outputs as one tensor or a list of them.
        dy: the outputs' gradients, as `convolution` returns the outputs.
        inputs: all that has a gradient, None for what was not given.
        cotangents: for each input the gradient of what the backward pass gave for it; not read where the input is
            None, zeros where it is None itself.

    Returns:
        What dy gets, built as dy, and what each input gets, None for what was not given.
    """
    given = [slot for slot, tensor in enumerate(inputs) if tensor is not None]

    def backward(dy: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def convolve(*tensors: torch.Tensor) -> Any:
            by_slot = dict(zip(given, tensors, strict=True))
            return convolution(*(by_slot.get(slot) for slot in range(len(inputs))))

        _, gradients = torch.func.vjp(convolve, *tensors)
        return gradients(dy)

    # torch.func, not torch.autograd.grad: an input may depend on another one, and their own history is not ours. It
    # also works inside of torch.func's transformations.
    _, pull_back = torch.func.vjp(backward, dy, *(inputs[slot] for slot in given))
    of_gradients = (torch.zeros_like(inputs[slot]) if cotangents[slot] is None else cotangents[slot] for slot in given)
    ddy, *found = pull_back(tuple(of_gradients))
    by_slot = dict(zip(given, found, strict=True))
    return ddy, [by_slot.get(slot) for slot in range(len(inputs))]
