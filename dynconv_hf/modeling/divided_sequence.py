"""A sequence divided over ranks is refused: a convolution needs the inputs before its part, which another rank has.

Attention may be divided by others, without the model's knowledge: they replace the attention function, or PyTorch's,
by one that gathers keys and values. The first tokens of every part would then be convolved with nothing before them.
"""

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from .configuration_dynconv_llama import DynConvLlamaConfig

__all__ = ["refuse_divided_sequence", "refuse_gathering"]

_COLLECTIVES = {"c10d", "_c10d_functional", "_c10d_functional_autograd"}
# What F.scaled_dot_product_attention is unless somebody has replaced it.
_TORCH_ATTENTION = torch._C._nn.scaled_dot_product_attention
# Attention functions from outside of transformers that have run without talking to other ranks.
_LOCAL: set[Callable] = set()


def refuse_divided_sequence(config: DynConvLlamaConfig) -> None:
    """Nothing, where every rank has whole sequences as far as PyTorch and accelerate know.

    Raises:
        ValueError: PyTorch's `context_parallel` is active, or accelerate divides sequences over ranks.
    """
    if not _several_ranks() or not _looks_back(config):
        return
    attention = F.scaled_dot_product_attention
    if attention is not _TORCH_ATTENTION and attention.__module__.startswith("torch.distributed."):
        raise _refusal(config, "torch's context_parallel is active", "call the model outside of it")
    # Not imported here: who uses it has done so.
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None:
        return
    parallelism = accelerate.AcceleratorState._shared_state.get("parallelism_config")
    for name in ("cp_size", "sp_size"):
        size = getattr(parallelism, name, None) or 1
        if size > 1:
            raise _refusal(config, f"accelerate's ParallelismConfig has {name}={size}", f"set {name}=1")


def refuse_gathering(attention: Callable, config: DynConvLlamaConfig) -> Callable:
    """The attention function, or, where its first call is still to be watched, one that does so.

    transformers' own functions do not talk to other ranks; any other may, as that of Ulysses or of a ring does.

    Raises:
        ValueError: on the first call, the function talks to other ranks; while compiling, it has not been called yet.
    """
    if not _several_ranks() or attention in _LOCAL or _is_from_transformers(attention) or not _looks_back(config):
        return attention
    if torch.compiler.is_compiling():
        raise ValueError(
            f"whether the attention function {_name(attention)} gathers over ranks, which the model's convolutions "
            "cannot, is not known before it has run: call the model once without torch.compile"
        )

    @wraps(attention)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with _RefuseCollectives(attention, config):
            result = attention(*args, **kwargs)
        _LOCAL.add(attention)
        return result

    return watched


class _RefuseCollectives(TorchDispatchMode):
    """Raises where a collective or a message to another rank would start; every rank comes here, so none waits."""

    supports_higher_order_operators = True

    def __init__(self, attention: Callable, config: DynConvLlamaConfig) -> None:
        super().__init__()
        self.attention = attention
        self.config = config

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "namespace", None) in _COLLECTIVES:
            raise _refusal(
                self.config,
                f"the attention function {_name(self.attention)} talks to other ranks ({func})",
                "choose an attention that does not, as with model.set_attn_implementation('sdpa')",
            )
        return func(*args, **(kwargs or {}))


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _looks_back(config: DynConvLlamaConfig) -> bool:
    return "hybrid" in config.layer_types


def _is_from_transformers(attention: Callable) -> bool:
    while isinstance(attention, partial):
        attention = attention.func
    return getattr(attention, "__module__", "").startswith("transformers.")


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", repr(function))


def _refusal(config: DynConvLlamaConfig, finding: str, remedy: str) -> ValueError:
    return ValueError(
        f"{finding}, but a sequence cannot be divided over ranks: convolutions with "
        f"conv_kernel_size={config.conv_kernel_size} need the inputs of the {config.conv_kernel_size - 1} tokens "
        f"before a rank's part, which another rank has. Give every rank whole sequences: {remedy}"
    )
