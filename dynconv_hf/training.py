"""Training: which parameters learn, and how."""

import sys
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .modeling import DynamicShortConv

__all__ = ["freeze_base", "is_adapted", "parameter_groups"]


Model = TypeVar("Model", bound=nn.Module)


def freeze_base(model: Model) -> Model:
    """Leaves only the convolutions to train, in place: no other parameter requires a gradient any more.

    Args:
        model: any model with a [`DynamicShortConv`]; also one that is wrapped. Of a PEFT model, the convolutions of
            the active adapter train, which must save them: see [`~dynconv_hf.lora_config`].

    Returns:
        The same model.

    Raises:
        ValueError: the model has no convolution; its active PEFT adapter would not save them; or it is in a
            `DistributedDataParallel` that waits for gradients of the base.

    Example:

    ```python
    >>> model = freeze_base(dynconv_hf.retrofit("meta-llama/Llama-3.2-1B"))
    >>> model.num_parameters(only_trainable=True)
    ```
    """
    convs = _convs_to_train(model)
    if not convs:
        raise ValueError(f"this {type(model).__name__} has no convolution to train: retrofit() it first")
    trained = {id(parameter) for conv in convs for parameter in conv.parameters()}
    in_ddp = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    changed = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad != (id(parameter) in trained)
    ]
    if in_ddp and changed:
        raise ValueError(
            f"this model is in a DistributedDataParallel, which has already noted that {changed[0]} "
            "is trained or not: freeze the base before wrapping the model"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has changed modules of the model."""
    return any(_peft_modules(model))


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


def _convs_to_train(model: nn.Module) -> list[DynamicShortConv]:
    """All convolutions; of a PEFT model, the copies that belong to the active adapter."""
    convs = [module for module in model.modules() if isinstance(module, DynamicShortConv)]
    if not is_adapted(model):
        return convs
    _, kept = _peft_modules(model)
    active = [
        copy
        for wrapper in kept
        if isinstance(wrapper.original_module, DynamicShortConv)
        for name, copy in wrapper.modules_to_save.items()
        if name in wrapper.active_adapters
    ]
    wrapped = {id(conv) for wrapper in kept for conv in wrapper.modules() if isinstance(conv, DynamicShortConv)}
    if not active or any(id(conv) not in wrapped for conv in convs):
        raise ValueError(
            "the active PEFT adapter of this model does not save its convolutions, which would be trained for "
            "nothing: make the adapter with dynconv_hf.lora_config(model)"
        )
    return active


def _peft_modules(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that PEFT tunes, and those that it keeps a trained copy of."""
    # Without PEFT there is nothing to find, and importing it takes a while.
    if sys.modules.get("peft") is None:
        return [], []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    modules = list(model.modules())
    tuned = [module for module in modules if isinstance(module, BaseTunerLayer)]
    return tuned, [module for module in modules if isinstance(module, ModulesToSaveWrapper)]
