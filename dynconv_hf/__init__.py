"""Dynamic short convolutions for Hugging Face transformers; importing it registers the models with Auto classes."""

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

__version__ = "0.1.0"

__all__ = [
    "DynConvLlamaConfig",
    "DynConvLlamaForCausalLM",
    "DynConvLlamaForQuestionAnswering",
    "DynConvLlamaForSequenceClassification",
    "DynConvLlamaForTokenClassification",
    "DynConvLlamaModel",
    "DynamicShortConv",
    "retrofit",
    "retrofit_checkpoint",
]
