"""Liger's kernels in DynConv models: Liger, and Trainer with `use_liger_kernel=True`, look in a table of model types.

For a model type that the table lacks they do nothing, and say nothing.
"""

import sys
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

__all__ = ["apply_liger_kernel_to_dynconv_llama", "register_with_liger"]

logger = logging.get_logger(__name__)

_TABLE_MODULE = "liger_kernel.transformers.monkey_patch"
_MODEL_TYPE = "dynconv_llama"


def register_with_liger(import_it: bool = False) -> None:
    """Puts the function below into Liger's table; where Liger is not imported yet, only if `import_it`.

    Called when a config is made, which is what Liger's own Auto class looks at, and when a model is, since Trainer
    imports Liger only when it has one. Not earlier, since Liger takes a second to import.
    """
    if _TABLE_MODULE not in sys.modules and not (import_it and find_spec("liger_kernel")):
        return
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as error:
        # Liger looks for a GPU and a Triton that it knows. The model runs without it; whoever uses it meets the same
        # error there.
        logger.warning(f"Liger cannot be imported, and does not learn of {_MODEL_TYPE}: {error}")
        return
    MODEL_TYPE_TO_APPLY_LIGER_FN.setdefault(_MODEL_TYPE, apply_liger_kernel_to_dynconv_llama)


def apply_liger_kernel_to_dynconv_llama(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: PreTrainedModel | None = None,
) -> None:
    """As Liger's function for a Llama, in a model or, where none is given, in all that are made from now on.

    `rope` changes nothing: the convolutions' own kernels rotate. Liger's MLP knows no convolutions; `swiglu` puts its
    kernel into ours, where the activation is SiLU.
    """
    from liger_kernel.transformers import LigerRMSNorm, apply_liger_kernel_to_llama

    from . import modeling_dynconv_llama

    apply_liger_kernel_to_llama(
        rope=False,
        cross_entropy=cross_entropy,
        # What Liger puts in place of `forward` calls the head of a language model, whatever the model.
        fused_linear_cross_entropy=fused_linear_cross_entropy and isinstance(model, LlamaForCausalLM | None),
        rms_norm=rms_norm,
        swiglu=False,
        model=model,
    )
    if model is None:
        if rms_norm:
            modeling_dynconv_llama.LlamaRMSNorm = LigerRMSNorm
        if swiglu:
            modeling_dynconv_llama.DynConvLlamaMLP.activate = _activate
    elif swiglu:
        for module in model.modules():
            # By name: the model may be of another copy of this code, from a checkpoint.
            if type(module).__name__ == "DynConvLlamaMLP":
                module.activate = MethodType(_activate, module)


def _activate(mlp: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    if mlp.config.hidden_act not in ("silu", "swish"):
        return mlp.act_fn(gate) * up
    return liger_swiglu(gate, up)
