"""The models that the tests of modeling share."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from dynconv_hf import DynConvLlamaForCausalLM, retrofit

STORIES = str(Path(__file__).parents[2] / "examples" / "assets" / "stories260K")
PROMPT = "Once upon a time, there was a little girl named Lily. She"
QKV = ("q_proj", "k_proj", "v_proj")
VARIANTS = [(mode, targets) for mode in ("lowrank", "headwise", "static") for targets in (QKV, "all-linear")]


def base_model(**kwargs) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(STORIES, **kwargs).eval()


def prompt_ids(prompt: str = PROMPT) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(STORIES)(prompt, return_tensors="pt").input_ids


def moved_model(mode: str = "lowrank", targets="all-linear", **kwargs) -> DynConvLlamaForCausalLM:
    """stories260K with convolutions that are far from the identity."""
    kwargs = {"conv_mode": mode, "conv_targets": targets, "conv_head_size": 4, **kwargs}
    return move_convs(retrofit(STORIES, **kwargs))


def move_convs(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "_conv." in name:
            # Far enough to change predictions, near enough that float32 noise is not blown up by the model: hidden
            # states are large here, so the projection that makes filters of them is small.
            std = 0.02 if "filter_proj" in name else 0.1
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 512, (batch, tokens), generator=torch.Generator().manual_seed(seed))
