"""What learns and how: every trained parameter in one group, what decays, and a frozen base."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM, freeze_base, lora_config, parameter_groups

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_bias": True,
}


def groups_by_name(model, **rates):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, **rates)
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}, groups


@pytest.mark.parametrize("mode", ["lowrank", "headwise", "static"])
@pytest.mark.parametrize("tied", [False, True])
def test_each_trained_parameter_is_in_one_group(mode, tied):
    model = DynConvLlamaForCausalLM(
        DynConvLlamaConfig(**SIZES, conv_mode=mode, conv_targets="all-linear", tie_word_embeddings=tied)
    )
    model.model.layers[0].requires_grad_(False)
    groups = parameter_groups(model, learning_rate=1.0)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert torch.optim.AdamW(groups).param_groups


def test_rates_and_decay():
    model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**SIZES, conv_targets=["q_proj", "down_proj"]))
    groups, _ = groups_by_name(model, learning_rate=1.0, conv_learning_rate=2.0, weight_decay=0.5)
    for name, group in groups.items():
        in_conv = "_conv." in name
        is_vector = name.endswith(("norm.weight", ".bias"))
        assert group["lr"] == (2.0 if in_conv else 1.0), name
        assert group["weight_decay"] == (0.0 if in_conv or is_vector else 0.5), name
    assert sum("_conv." in name for name in groups) == 2 * 2 * 3


def test_convolutions_learn_like_the_rest_unless_told_otherwise():
    model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**SIZES))
    groups, _ = groups_by_name(model, learning_rate=1.0)
    assert {group["lr"] for group in groups.values()} == {1.0}


def test_found_inside_a_wrapper():
    model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**SIZES))
    _, groups = groups_by_name(nn.ModuleDict({"wrapped": model}), learning_rate=1.0, conv_learning_rate=2.0)
    assert [group["lr"] for group in groups] == [1.0, 1.0, 2.0]


def test_a_zero_rate_is_a_rate():
    model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**SIZES))
    groups = parameter_groups(model, learning_rate=1.0, conv_learning_rate=0.0)
    assert groups[-1]["lr"] == 0.0


def test_a_model_without_convolutions():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert len(parameter_groups(model, learning_rate=1.0)) == 2
    with pytest.raises(ValueError, match=r"conv_learning_rate is 0\.1, but this LlamaForCausalLM trains no"):
        parameter_groups(model, learning_rate=1.0, conv_learning_rate=0.1)


@pytest.mark.parametrize("name", ["learning_rate", "conv_learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, float("nan")])
def test_bad_rates(name, value):
    model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=f"^{name} must be at least 0, got {value}"):
        parameter_groups(model, **{"learning_rate": 1.0, name: value})


def test_nothing_to_train():
    model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**SIZES)).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model, learning_rate=1.0)


def small_model(**kwargs):
    torch.manual_seed(0)
    return DynConvLlamaForCausalLM(DynConvLlamaConfig(**SIZES, **kwargs))


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("mode", ["lowrank", "headwise", "static"])
def test_a_frozen_base_leaves_the_convolutions(mode):
    model = small_model(conv_mode=mode, conv_targets="all-linear")
    model.model.layers[0].requires_grad_(False)
    assert freeze_base(model) is model
    assert trained_names(model) == {name for name, _ in model.named_parameters() if "_conv." in name}
    assert len(parameter_groups(model, learning_rate=1.0)) == 1


def test_only_the_convolutions_of_the_active_adapter_train():
    model = small_model()
    model = get_peft_model(model, lora_config(model))
    model.add_adapter("second", lora_config(model))
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        freeze_base(model)
        trained = trained_names(model)
        assert len(trained) == 2 * 3 * 3
        assert all(f"_conv.modules_to_save.{adapter}." in name for name in trained)


def test_convolutions_that_an_adapter_would_not_save():
    model = get_peft_model(small_model(), LoraConfig(target_modules="all-linear"))
    before = trained_names(model)
    with pytest.raises(ValueError, match="does not save its convolutions"):
        freeze_base(model)
    model = small_model()
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=["q_conv"]))
    with pytest.raises(ValueError, match="does not save its convolutions"):
        freeze_base(model)
    assert before == {name for name in before if "lora_" in name}


def test_nothing_to_freeze_a_base_for():
    with pytest.raises(ValueError, match="this LlamaForCausalLM has no convolution to train"):
        freeze_base(LlamaForCausalLM(LlamaConfig(**SIZES)))


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_a_trainer_trains_the_convolutions_alone(tmp_path, checkpointing):
    model = freeze_base(small_model(conv_targets="all-linear", conv_init="identity"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=bool(checkpointing),
        gradient_checkpointing_kwargs=checkpointing or None,
    )
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)}] * 8
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == trained_names(model)
