"""Placement by accelerate: device maps, offloading to disk and to the CPU."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dynconv_hf import retrofit

from .models import random_model, save_base, save_random_model, tokens

AROUND = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAPS = {
    "auto": "auto",
    "cpu": {"": "cpu"},
    "a layer on disk": {**AROUND, "model.layers.0": "cpu", "model.layers.1": "disk"},
    "all layers on disk": {**AROUND, "model.layers": "disk"},
    "a block on disk": {
        **AROUND,
        "model.layers.0": "cpu",
        "model.layers.1.self_attn": "cpu",
        "model.layers.1.mlp": "disk",
        "model.layers.1.input_layernorm": "cpu",
        "model.layers.1.post_attention_layernorm": "cpu",
    },
}
MODES = ("lowrank", "headwise", "static")


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    input_ids = tokens()
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, other(input_ids).logits)
    options = {"attention_mask": attention_mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(input_ids, **options), other.generate(input_ids, **options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device_map", MAPS)
def test_from_pretrained(tmp_path: Path, device_map: str, mode: str) -> None:
    path = save_random_model(tmp_path / "model", conv_mode=mode, conv_targets="all-linear")
    placed = AutoModelForCausalLM.from_pretrained(
        path, device_map=MAPS[device_map], offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in placed.parameters()) == ("disk" in device_map)
    assert_same(placed, AutoModelForCausalLM.from_pretrained(path))


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_retrofit(tmp_path: Path, device_map: str) -> None:
    path = save_base(tmp_path / "base")
    assert_same(retrofit(path, device_map=MAPS[device_map]), LlamaForCausalLM.from_pretrained(path))


def test_retrofit_with_old_layers_on_disk(tmp_path: Path) -> None:
    path = save_base(tmp_path / "base")
    placed = retrofit(path, conv_layers=[0], device_map=MAPS["a layer on disk"], offload_folder=tmp_path / "offload")
    assert_same(placed, LlamaForCausalLM.from_pretrained(path))


def test_new_convolutions_on_disk_are_refused(tmp_path: Path) -> None:
    path = save_base(tmp_path / "base")
    with pytest.raises(ValueError, match=r"offloads new convolutions to disk.*save_pretrained\(directory\)"):
        retrofit(path, device_map=MAPS["a layer on disk"], offload_folder=tmp_path / "offload")


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_model_object(tmp_path: Path, offload: object) -> None:
    options = {"offload_dir": tmp_path} if offload is disk_offload else {}
    model = random_model(conv_targets="all-linear")
    offloaded = offload(random_model(conv_targets="all-linear"), execution_device="cpu", **options)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert_same(offloaded, model)


def test_retrofit_refuses_an_offloaded_model_object(tmp_path: Path) -> None:
    base = cpu_offload(LlamaForCausalLM.from_pretrained(save_base(tmp_path)), execution_device="cpu")
    with pytest.raises(ValueError, match=r"meta device.*retrofit\(name_or_path, device_map"):
        retrofit(base)


def test_auto_map_keeps_a_decoder_layer_together() -> None:
    model = random_model(conv_targets="all-linear", num_hidden_layers=6)
    half = sum(parameter.nbytes for parameter in model.parameters()) // 2
    device_map = infer_auto_device_map(
        model, max_memory={"cpu": half, "disk": 2 * half}, no_split_module_classes=model._no_split_modules
    )
    layers = {name: device for name, device in device_map.items() if name.startswith("model.layers.")}
    assert set(layers.values()) == {"cpu", "disk"}
    assert set(layers) == {f"model.layers.{layer_idx}" for layer_idx in range(6)}
