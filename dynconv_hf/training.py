"""Training: which parameters learn how."""

from typing import Any

from torch import nn

from .modeling import DynamicShortConv

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    conv_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The groups that an optimizer of `torch.optim` takes: matrices, vectors, and the convolutions by themselves.

    Weight decay applies to matrices. It does not apply to vectors (norms and biases), nor to the convolutions: what
    decay would draw their filters towards is the model without convolutions.

    Args:
        model: any model; also one that is wrapped, or has adapters. Parameters that do not require a gradient are
            left out.
        learning_rate: for everything but the convolutions.
        conv_learning_rate: for the parameters of every [`DynamicShortConv`]; None: `learning_rate`.
        weight_decay: for matrices.

    Raises:
        ValueError: a rate or the decay is negative, no parameter requires a gradient, or `conv_learning_rate` is
            given where no convolution is trained.

    Example:

    ```python
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-4, conv_learning_rate=1e-3))
    ```
    """
    rates = {"learning_rate": learning_rate, "conv_learning_rate": conv_learning_rate, "weight_decay": weight_decay}
    for name, value in rates.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"no parameter of this {type(model).__name__} requires a gradient: there is nothing to train")
    in_convs = _conv_parameter_ids(model)
    convs = [parameter for parameter in trained if id(parameter) in in_convs]
    if conv_learning_rate is not None and not convs:
        raise ValueError(
            f"conv_learning_rate is {conv_learning_rate!r}, but this {type(model).__name__} trains no convolution"
        )
    others = [parameter for parameter in trained if id(parameter) not in in_convs]
    groups = [
        {
            "params": [parameter for parameter in others if parameter.ndim >= 2],
            "lr": learning_rate,
            "weight_decay": weight_decay,
        },
        {
            "params": [parameter for parameter in others if parameter.ndim < 2],
            "lr": learning_rate,
            "weight_decay": 0.0,
        },
        {
            "params": convs,
            "lr": learning_rate if conv_learning_rate is None else conv_learning_rate,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def _conv_parameter_ids(model: nn.Module) -> set[int]:
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, DynamicShortConv)
        for parameter in module.parameters()
    }
