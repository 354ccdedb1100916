"""LoRA and convolution adapters over bases in 4 and 8 bits."""

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from dynconv_hf import (
    DynamicShortConv,
    freeze_base,
    load_conv_adapter,
    load_lora,
    lora_config,
    retrofit,
    save_conv_adapter,
)

from ..modeling.models import random_ids
from ..parallel.models import save_base
from .models import logits, loss, train

pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")

bits = pytest.mark.parametrize("bits", ["4bit", "8bit"])


@pytest.fixture
def base(tmp_path):
    # In 4 bits, bitsandbytes takes only some widths on a CPU, to which those of stories260K do not belong.
    return str(save_base(tmp_path / "base", hidden_size=64, intermediate_size=128, vocab_size=512))


def quantized(bits: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**{f"load_in_{bits}": True})


@bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora(base, bits, dtype, tmp_path):
    model = retrofit(base, quantization_config=quantized(bits), dtype=dtype, conv_targets="all-linear")
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, lora_config(model, r=4))
    convs = {name: parameter for name, parameter in model.named_parameters() if ".modules_to_save." in name}
    assert len(convs) == 2 * 7 * 3
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in convs.values())
    before = logits(model)
    train(model, steps=3)
    # Before saving: on a CPU, bitsandbytes unpacks what it saves, and computes with it in another precision.
    expected = logits(model)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path / "adapter")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == len(trained)
    loaded = load_lora(tmp_path / "adapter", quantization_config=quantized(bits), dtype=dtype)
    # Preparing for training also made the norms and embeddings float32.
    loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
    assert torch.equal(logits(loaded), expected)


@bits
def test_convolution_adapter(base, bits, tmp_path):
    model = freeze_base(retrofit(base, quantization_config=quantized(bits), conv_targets="all-linear"))
    train(model, steps=3)
    save_conv_adapter(model, tmp_path / "adapter")
    loaded = load_conv_adapter(tmp_path / "adapter", quantization_config=quantized(bits))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@bits
def test_lora_on_a_gpu(bits, tmp_path):
    """As fine-tuning goes on a GPU: under autocast, with convolutions of whatever dtype the adapter makes of them."""
    # Wide enough for the fastest kernels.
    base = str(save_base(tmp_path / "base", hidden_size=256, intermediate_size=512, vocab_size=512))
    options = {"dtype": torch.bfloat16, "quantization_config": quantized(bits)}
    if bits == "4bit":
        four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **four_bit
        )
    model = retrofit(base, conv_targets="all-linear", **options)
    convs = [module for module in model.modules() if isinstance(module, DynamicShortConv)]
    assert {(p.dtype, p.device.type) for conv in convs for p in conv.parameters()} == {(torch.bfloat16, "cuda")}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, lora_config(model, r=4))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        before = loss(model)
        train(model, steps=10)
        assert loss(model) < before - 0.1
        expected = logits(model)
        text = model.generate(input_ids=random_ids(2, 9).cuda(), max_new_tokens=20, do_sample=False)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_lora(tmp_path / "adapter", **options)
    loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(logits(loaded), expected)
        assert torch.equal(
            loaded.generate(input_ids=random_ids(2, 9).cuda(), max_new_tokens=20, do_sample=False), text
        )
