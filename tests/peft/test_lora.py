"""LoRA with the convolutions trained in full: what is trained is saved, what is saved is loaded."""

import copy
import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dynconv_hf import (
    DynConvLlamaForCausalLM,
    DynConvLlamaForSequenceClassification,
    load_lora,
    lora_config,
    retrofit,
)

from ..modeling.models import QKV, STORIES, VARIANTS, base_model, move_convs
from .models import ROOT, in_new_process, logits, text_ids, train


def adapted(seed: int = 0, conv: dict | None = None, **lora) -> PeftModel:
    torch.manual_seed(seed)
    model = retrofit(STORIES, **{"conv_rank": 3, "conv_head_size": 4, **(conv or {})})
    return get_peft_model(model, lora_config(model, r=4, **lora))


def trained_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def base_digest() -> str:
    return hashlib.sha256((Path(STORIES) / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("mode", "targets"), VARIANTS)
@pytest.mark.parametrize("layers", [None, [1, 3]], ids=["all layers", "two layers"])
def test_the_file_holds_exactly_what_was_trained(mode, targets, layers, tmp_path):
    model = adapted(conv={"conv_mode": mode, "conv_targets": targets, "conv_layers": layers})
    before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    trained, saved = trained_tensors(model), load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(saved[name], tensor), name
        assert not torch.equal(before[name], tensor), f"{name} was not trained"
    # All convolutions are there, by the names that the retrofit gives them.
    convs = {name for name, _ in retrofit_of(model).named_parameters() if "_conv." in name}
    assert {name.removeprefix("base_model.model.") for name in saved if "_conv." in name} == convs
    torch.manual_seed(1)  # A fresh retrofit draws other filter projections.
    loaded = load_lora(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_does_not_warn_of_the_base(tmp_path, monkeypatch, caplog):
    model = adapted()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model.save_pretrained(tmp_path)
    assert "model of type" not in caplog.text


def retrofit_of(model: PeftModel) -> DynConvLlamaForCausalLM:
    config = model.config
    fields = {name: getattr(config, name) for name in vars(config) if name.startswith("conv_")}
    return retrofit(STORIES, **fields)


def test_after_50_steps_in_a_new_process(tmp_path):
    digest = base_digest()
    model = adapted(conv={"conv_targets": "all-linear"}, lora_dropout=0.05)
    start = logits(model)
    train(model, steps=50)
    model.save_pretrained(tmp_path / "adapter")
    code = """
from tests.peft.models import logits
model = dynconv_hf.load_lora(sys.argv[1])
torch.save(logits(model), sys.argv[2])
import peft
retrofit = dynconv_hf.retrofit(sys.argv[3], conv_targets="all-linear", conv_rank=3)
model = peft.PeftModel.from_pretrained(retrofit, sys.argv[1])
torch.save(logits(model), sys.argv[4])
"""
    in_new_process(code, tmp_path / "adapter", tmp_path / "logits", STORIES, tmp_path / "by_peft")
    assert torch.equal(torch.load(tmp_path / "logits"), logits(model))
    assert torch.equal(torch.load(tmp_path / "by_peft"), logits(model))
    assert (logits(model) - start).abs().max() > 1
    assert base_digest() == digest


def test_merged_it_is_a_plain_model(tmp_path):
    model = adapted(conv={"conv_targets": "all-linear"})
    train(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is DynConvLlamaForCausalLM
    assert merged.state_dict().keys() == retrofit(STORIES, conv_targets="all-linear").state_dict().keys()
    # Rounded once more, where the weights are merged.
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-3)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is DynConvLlamaForCausalLM
    assert torch.equal(logits(again), logits(merged))


def test_several_adapters():
    base = logits(base_model())
    model = adapted()
    train(model)
    first = logits(model)
    model.add_adapter("second", lora_config(model, r=2))
    model.set_adapter("second")
    assert torch.equal(logits(model), base)
    train(model, steps=3)
    second = logits(model)
    # One that trains no convolution runs on those of the retrofit.
    model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("plain")
    assert torch.equal(logits(model), base)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)


def test_several_adapters_saved_and_loaded(tmp_path):
    model = adapted()
    train(model)
    model.add_adapter("second", lora_config(model, r=2))
    model.set_adapter("second")
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    loaded = load_lora(tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(load_lora(tmp_path / "second")), logits(model))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def run_trainer(directory, steps_until=6, resume=None, **options):
    model = adapted()
    rows = [{"input_ids": row, "labels": row} for row in text_ids(8, 32)]
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=6,
        per_device_train_batch_size=2,
        save_steps=3,
        learning_rate=3e-3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[StopAt(steps_until)])
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_training_resumes_from_the_adapter(tmp_path):
    whole = run_trainer(tmp_path / "whole")
    run_trainer(tmp_path / "stopped", steps_until=3)
    resumed = run_trainer(tmp_path / "stopped", resume=str(tmp_path / "stopped" / "checkpoint-3"))
    assert torch.equal(logits(resumed), logits(whole))
    # Without a Trainer: the adapter is loaded, and all that was trained trains on.
    loaded = load_lora(tmp_path / "stopped" / "checkpoint-6", is_trainable=True)
    assert trained_tensors(loaded).keys() == trained_tensors(whole).keys()
    before = logits(loaded)
    train(loaded, steps=1)
    assert not torch.equal(logits(loaded), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, use_reentrant):
    plain = run_trainer(tmp_path / "plain")
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    checkpointed = run_trainer(tmp_path / "checkpointed", gradient_checkpointing=True, **options)
    torch.testing.assert_close(logits(checkpointed), logits(plain), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions_load_in_the_dtype_they_were_saved_in(tmp_path, dtype):
    model = retrofit(STORIES, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("_conv"):
            module.to(dtype)
    model = get_peft_model(model, lora_config(model))
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    loaded = load_lora(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16
    kept = {p.dtype for n, p in loaded.named_parameters() if "_conv" in n and "modules_to_save" in n}
    assert kept == {dtype}


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        ({"conv_targets": ["q_proj"]}, "its conv_targets is .* but that of the base is"),
        ({"conv_layers": [0]}, r"its conv_layers is None, but that of the base is \[0\]"),
        ({"conv_rank": 4}, "its conv_rank is 3, but that of the base is 4"),
        ({"conv_residual": False, "conv_init": "uniform"}, "its conv_residual is True"),
    ],
)
def test_another_retrofit_is_refused(conv, message, tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_lora(tmp_path, retrofit(STORIES, **{"conv_rank": 3, **conv}))


def test_bases_that_fit(tmp_path):
    model = adapted()
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    own = retrofit(STORIES, conv_rank=3)
    assert torch.equal(logits(load_lora(tmp_path / "adapter", own)), expected)
    assert torch.equal(logits(load_lora(tmp_path / "adapter", base_model())), expected)
    move_convs(retrofit(STORIES, conv_rank=3)).save_pretrained(tmp_path / "base")
    assert torch.equal(logits(load_lora(tmp_path / "adapter", tmp_path / "base")), expected)


def test_bases_that_do_not_fit(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    small = base_model()
    small.config.num_hidden_layers = 2
    del small.model.layers[2:]
    with pytest.raises(ValueError, match="does not fit this base: has no place for"):
        load_lora(tmp_path / "adapter", small)
    with pytest.raises(TypeError, match=r"go with a name or path of the base, got \['dtype'\]"):
        load_lora(tmp_path / "adapter", base_model(), dtype=torch.bfloat16)
    model.peft_config["default"].auto_mapping = None
    model.save_pretrained(tmp_path / "no_record")
    with pytest.raises(ValueError, match="does not say which convolutions"):
        load_lora(tmp_path / "no_record")
    assert torch.equal(logits(load_lora(tmp_path / "no_record", retrofit(STORIES, conv_rank=3))), logits(model))


def test_an_adapter_without_its_convolutions_is_refused(tmp_path):
    model = retrofit(STORIES, conv_rank=3)
    config = lora_config(model)
    config.modules_to_save = ["q_conv"]
    get_peft_model(model, config).save_pretrained(tmp_path)
    weights = load_peft_weights(tmp_path)
    assert not any("k_conv" in name for name in weights)
    # Its config says what it holds: nothing is lost, and the others start as the retrofit has them.
    load_lora(tmp_path)


def test_the_config():
    model = retrofit(STORIES, conv_targets=["v_proj", "down_proj"])
    config = lora_config(model, r=2, lora_alpha=5, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 5, {"q_proj"})
    assert config.modules_to_save == ["down_conv", "v_conv", "lm_head"]
    assert config.task_type == "CAUSAL_LM"
    everything = get_peft_model(model, lora_config(model)).peft_config["default"]
    assert everything.target_modules == {*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_head_of_a_classifier_is_trained_too(tmp_path):
    retrofit(STORIES).save_pretrained(tmp_path / "base")
    model = DynConvLlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    start = copy.deepcopy(model)
    model = get_peft_model(model, lora_config(model))
    assert model.active_peft_config.task_type == "SEQ_CLS"
    move_convs(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_lora(tmp_path / "adapter", start)), logits(model))
    with pytest.raises(ValueError, match="is for the task SEQ_CLS: give the model as `base`"):
        load_lora(tmp_path / "adapter")


def test_arguments_held_wrong():
    model = retrofit(STORIES)
    with pytest.raises(ValueError, match="takes a DynConv model, got LlamaForCausalLM"):
        lora_config(base_model())
    with pytest.raises(ValueError, match=r"target_modules names 'q_conv\.filter_proj', but convolutions"):
        lora_config(model, target_modules=["q_conv.filter_proj"])
    with pytest.raises(ValueError, match=r"target_parameters names 'q_conv\.basis'"):
        lora_config(model, target_parameters=["q_conv.basis"])
    with pytest.raises(TypeError, match="auto_mapping itself"):
        lora_config(model, auto_mapping={})
    with pytest.raises(TypeError, match="lora_rank"):
        lora_config(model, lora_rank=3)


def test_importing_the_package_does_not_import_peft():
    code = "import sys, dynconv_hf; print('peft' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "False"
