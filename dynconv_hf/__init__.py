"""Dynamic short convolutions for Hugging Face transformers; importing it registers the models with Auto classes."""

from .conv_adapter import load_conv_adapter, push_conv_adapter, save_conv_adapter
from .lora import load_lora, lora_config
from .modeling import (
    DynamicShortConv,
    DynConvLlamaConfig,
    DynConvLlamaForCausalLM,
    DynConvLlamaForQuestionAnswering,
    DynConvLlamaForSequenceClassification,
    DynConvLlamaForTokenClassification,
    DynConvLlamaModel,
)
from .retrofit import retrofit
from .retrofit_checkpoint import retrofit_checkpoint
from .training import freeze_base, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "DynConvLlamaConfig",
    "DynConvLlamaForCausalLM",
    "DynConvLlamaForQuestionAnswering",
    "DynConvLlamaForSequenceClassification",
    "DynConvLlamaForTokenClassification",
    "DynConvLlamaModel",
    "DynamicShortConv",
    "freeze_base",
    "load_conv_adapter",
    "load_lora",
    "lora_config",
    "parameter_groups",
    "push_conv_adapter",
    "retrofit",
    "retrofit_checkpoint",
    "save_conv_adapter",
]
