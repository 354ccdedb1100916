"""The small models of these tests, with convolutions that do something."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynconv_hf import DynamicShortConv, DynConvLlamaConfig, DynConvLlamaForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "conv_head_size": 4,
    "conv_rank": 3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def random_model(**fields: Any) -> DynConvLlamaForCausalLM:
    torch.manual_seed(0)
    model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**{**SIZES, **fields})).eval()
    randomize_convs(model)
    return model


@torch.no_grad()
def randomize_convs(model: torch.nn.Module) -> None:
    """Away from the start, where the dynamic part is zero and a wrong one would not show."""
    for module in model.modules():
        if isinstance(module, DynamicShortConv):
            for parameter in module.parameters():
                parameter.normal_(std=0.3)


def save_random_model(path: Path, **fields: Any) -> Path:
    random_model(**fields).save_pretrained(path)
    return path


def save_base(path: Path, **fields: Any) -> Path:
    """A plain Llama."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if not name.startswith("conv_")}
    LlamaForCausalLM(LlamaConfig(**{**sizes, **fields})).save_pretrained(path)
    return path


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=generator)
