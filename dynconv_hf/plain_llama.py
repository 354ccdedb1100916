"""Whether a Llama in memory is what its config says: whatever else it has would be lost when it gets convolutions."""

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel

__all__ = ["check_attention", "check_forwards", "check_layers", "check_weights"]

# What decides the output of a model, and is not carried over from a class of the user's.
METHODS = ("forward", "__call__", "generate", "prepare_inputs_for_generation")
# The numbers that attention takes from the config when it is made.
ATTENTION_NUMBERS = ("attention_dropout", "head_dim", "is_causal", "num_key_value_groups", "scaling")
# Liger's classes compute what those they replace compute; accelerate's hooks are noted on the module.
EQUAL_MODULES = ("liger_kernel.",)


def check_forwards(base: LlamaForCausalLM) -> None:
    """Refuses a model one of whose parts computes something of its own.

    Raises:
        ValueError: the model, its trunk, a layer, an attention or an MLP has a method that Llama's has not.
    """
    parts: list[tuple[str, nn.Module, type]] = [("", base, LlamaForCausalLM), ("model", base.model, LlamaModel)]
    for idx, layer in enumerate(base.model.layers):
        name = f"model.layers.{idx}"
        parts.append((name, layer, LlamaDecoderLayer))
        # Of a layer of another kind nothing more is known.
        if isinstance(layer, LlamaDecoderLayer):
            parts.append((f"{name}.self_attn", layer.self_attn, LlamaAttention))
            parts.append((f"{name}.mlp", layer.mlp, LlamaMLP))
    for name, module, expected in parts:
        method = _own_method(module, expected)
        if method is not None:
            raise ValueError(
                f"{name or 'this model'} is a {type(module).__name__} with a {method} of its own, which a model with "
                f"convolutions would not have: retrofit a plain {LlamaForCausalLM.__name__} with these weights, and "
                f"put the {method} on a subclass of DynConvLlamaForCausalLM"
            )


def check_layers(base: LlamaForCausalLM) -> None:
    """Refuses a model whose layers were taken out or added by hand.

    Raises:
        ValueError: there are more or fewer layers than the config tells of.
    """
    layers, told = len(base.model.layers), base.config.num_hidden_layers
    if layers != told:
        raise ValueError(
            f"this model has {layers} layers, but its config says num_hidden_layers={told}: set "
            f"model.config.num_hidden_layers = {layers} first"
        )


def check_attention(base: LlamaForCausalLM, model: nn.Module) -> None:
    """Refuses a model whose attention computes with other numbers than that of `model`, made from its config.

    Raises:
        ValueError: a number was changed by hand, such as the scaling of the scores.
    """
    for idx, (layer, new_layer) in enumerate(zip(base.model.layers, model.model.layers, strict=True)):
        for name in ATTENTION_NUMBERS:
            found, told = (getattr(each.self_attn, name, None) for each in (layer, new_layer))
            if found != told:
                raise ValueError(
                    f"model.layers.{idx}.self_attn.{name} is {found!r}, but its config makes it {told!r}: "
                    "set it in the config instead, or on the model that retrofit() returns"
                )


def check_weights(base: LlamaForCausalLM, model: nn.Module) -> None:
    """Refuses a model whose weights are not those that `model`, made from its config, has beside convolutions.

    They would be saved under names, or in shapes, in which no model looks for them when it is loaded.

    Raises:
        ValueError: there are adapters, parametrisations, or other weights than the config tells of.
    """
    for name, module in base.named_modules():
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"this model has an adapter ({name} is PEFT's {type(module).__name__}): give retrofit() the Llama "
                "without it and adapt the result, with dynconv_hf.lora_config(model); or merge the adapter first, "
                "with PeftModel.merge_and_unload(), and give retrofit() what that returns"
            )
        if is_parametrized(module):
            raise ValueError(
                f"{name} is parametrised ({', '.join(module.parametrizations)}): retrofit() the model before it is, "
                "or fix its weights first with torch.nn.utils.parametrize.remove_parametrizations"
            )
    # Quantised layers have weights of many names and shapes, as transformers knows.
    if getattr(base, "is_quantized", False) or getattr(base, "hf_quantizer", None) is not None:
        return
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items() if "_conv." not in name}
    found = {name: tuple(x.shape) for name, x in base.state_dict().items()}
    for name in sorted(expected.keys() ^ found.keys()):
        whose = "has no" if name in expected else "has a"
        raise ValueError(
            f"this model {whose} weight {name}, unlike the Llama that its config describes, and could not be loaded "
            "once it were saved: undo what was changed in it by hand, or change its config accordingly"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{name} has shape {found[name]}, but the config of this model asks for {shape}: change the config "
                "accordingly (resize_token_embeddings does so for a vocabulary)"
            )


def _own_method(module: nn.Module, expected: type) -> str | None:
    """The method that decides the output of `module` and is not that of the class `expected`."""
    if not isinstance(module, expected):
        return None if type(module).__module__.startswith(EQUAL_MODULES) else "forward"
    for method in METHODS:
        own = vars(module).get(method)
        if own is not None and not hasattr(module, "_hf_hook") and not _is_equal(own):
            return method
        of_class = getattr(type(module), method, None)
        if of_class is not getattr(expected, method, None) and not _is_equal(of_class):
            return method
    return None


def _is_equal(method: Any) -> bool:
    return getattr(method, "__module__", "").startswith(EQUAL_MODULES)
