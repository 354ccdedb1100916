"""What transformers sees: configuration, module and models; importing it registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_dynconv_llama import DynConvLlamaConfig
from .dynamic_conv import DynamicShortConv
from .modeling_dynconv_llama import (
    DynConvLlamaForCausalLM,
    DynConvLlamaForQuestionAnswering,
    DynConvLlamaForSequenceClassification,
    DynConvLlamaForTokenClassification,
    DynConvLlamaModel,
)

AutoConfig.register(DynConvLlamaConfig.model_type, DynConvLlamaConfig)
AutoModel.register(DynConvLlamaConfig, DynConvLlamaModel)
AutoModelForCausalLM.register(DynConvLlamaConfig, DynConvLlamaForCausalLM)
AutoModelForSequenceClassification.register(DynConvLlamaConfig, DynConvLlamaForSequenceClassification)
AutoModelForTokenClassification.register(DynConvLlamaConfig, DynConvLlamaForTokenClassification)
AutoModelForQuestionAnswering.register(DynConvLlamaConfig, DynConvLlamaForQuestionAnswering)

__all__ = [
    "DynConvLlamaConfig",
    "DynConvLlamaForCausalLM",
    "DynConvLlamaForQuestionAnswering",
    "DynConvLlamaForSequenceClassification",
    "DynConvLlamaForTokenClassification",
    "DynConvLlamaModel",
    "DynamicShortConv",
]
