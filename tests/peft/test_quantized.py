"""LoRA and convolution adapters over bases in 4 and 8 bits."""

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from dynconv_hf import freeze_base, load_conv_adapter, load_lora, lora_config, retrofit, save_conv_adapter

from ..modeling.models import STORIES
from .models import logits, train

pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")

bits = pytest.mark.parametrize("bits", ["4bit", "8bit"])


def quantized(bits: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**{f"load_in_{bits}": True})


@bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora(bits, dtype, tmp_path):
    model = retrofit(STORIES, quantization_config=quantized(bits), dtype=dtype, conv_targets="all-linear")
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, lora_config(model, r=4))
    convs = {name: parameter for name, parameter in model.named_parameters() if ".modules_to_save." in name}
    assert len(convs) == 5 * 7 * 3
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in convs.values())
    before = logits(model)
    train(model, steps=3)
    assert not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(trained)
    loaded = load_lora(tmp_path, quantization_config=quantized(bits), dtype=dtype)
    # Preparing for training also made the norms and embeddings float32.
    loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
    assert torch.equal(logits(loaded), logits(model))


@bits
def test_convolution_adapter(bits, tmp_path):
    model = freeze_base(retrofit(STORIES, quantization_config=quantized(bits), conv_targets="all-linear"))
    train(model, steps=3)
    save_conv_adapter(model, tmp_path / "adapter")
    loaded = load_conv_adapter(tmp_path / "adapter", quantization_config=quantized(bits))
    assert torch.equal(logits(loaded), logits(model))
