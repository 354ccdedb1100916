"""Quantised bases: the linear layers are quantised, the convolutions are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dynconv_hf import DynamicShortConv, retrofit

from .models import randomize_convs, save_base, tokens


def bitsandbytes_config(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torchao_config() -> Any:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZERS = {
    "bitsandbytes 4-bit": lambda: bitsandbytes_config(load_in_4bit=True),
    "bitsandbytes 8-bit": lambda: bitsandbytes_config(load_in_8bit=True),
    "torchao int8": torchao_config,
}
quantizers = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS.keys())


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    # Wide enough for a block of every quantiser.
    return save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens().to(model.device)).logits


def generated(model: torch.nn.Module) -> torch.Tensor:
    return model.generate(tokens().to(model.device), max_new_tokens=6, do_sample=False)


def assert_only_linears_are_quantized(model: torch.nn.Module, dtype: torch.dtype) -> None:
    linear = model.model.layers[0].mlp.up_proj
    assert linear.weight.dtype != dtype or type(linear.weight.data) is not torch.Tensor
    convs = [module for module in model.modules() if isinstance(module, DynamicShortConv)]
    assert len(convs) == 14
    for parameter in (parameter for conv in convs for parameter in conv.parameters()):
        assert type(parameter) is torch.nn.Parameter
        assert type(parameter.data) is torch.Tensor
        assert parameter.dtype == dtype
        assert parameter.requires_grad


def assert_saves_and_loads(model: torch.nn.Module, path: Path, dtype: torch.dtype, **options: Any) -> None:
    randomize_convs(model)
    model.save_pretrained(path, **options)
    again = AutoModelForCausalLM.from_pretrained(path)
    assert_only_linears_are_quantized(again, dtype)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(generated(again), generated(model))


@quantizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_path(base_path: Path, tmp_path: Path, quantizer: Callable, dtype: torch.dtype) -> None:
    base = LlamaForCausalLM.from_pretrained(base_path, quantization_config=quantizer(), dtype=dtype)
    model = retrofit(base_path, quantization_config=quantizer(), dtype=dtype, conv_targets="all-linear")
    assert_only_linears_are_quantized(model, dtype)
    assert torch.equal(logits(model), logits(base))
    assert_saves_and_loads(model, tmp_path / "saved", dtype)


@quantizers
def test_from_model_object(base_path: Path, tmp_path: Path, quantizer: Callable) -> None:
    base = LlamaForCausalLM.from_pretrained(base_path, quantization_config=quantizer())
    model = retrofit(base, conv_targets="all-linear")
    assert model.model.layers[1].mlp.up_proj is base.model.layers[1].mlp.up_proj
    assert model.is_quantized
    assert_only_linears_are_quantized(model, torch.float32)
    assert torch.equal(logits(model), logits(base))
    assert_saves_and_loads(model, tmp_path / "saved", torch.float32)


@quantizers
def test_from_quantized_checkpoint(base_path: Path, tmp_path: Path, quantizer: Callable) -> None:
    base = LlamaForCausalLM.from_pretrained(base_path, quantization_config=quantizer())
    base.save_pretrained(tmp_path / "quantized")
    model = retrofit(tmp_path / "quantized", conv_targets="all-linear")
    assert_only_linears_are_quantized(model, torch.float32)
    assert torch.equal(logits(model), logits(base))
    # transformers cannot save what it loaded quantised without this option, a plain Llama no more than this model.
    assert_saves_and_loads(model, tmp_path / "saved", torch.float32, save_original_format=False)


@quantizers
def test_convolutions_of_a_quantized_base_train(base_path: Path, quantizer: Callable) -> None:
    model = retrofit(base_path, quantization_config=quantizer(), conv_targets="all-linear")
    randomize_convs(model)
    # What training on a quantised base does: its linear layers stay as they are.
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.requires_grad_("Conv" in type(module).__name__ or "Filter" in type(module).__name__)
    ids = tokens().to(model.device)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "_conv." in name:
            assert parameter.grad.abs().max() > 0, name
