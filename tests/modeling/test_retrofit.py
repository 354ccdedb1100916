"""retrofit(): from a path or a model, what passes through, what is shared, what is refused."""

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dynconv_cli.errors import check_exists
from dynconv_hf import DynConvLlamaForCausalLM, load_conv_adapter, load_lora, retrofit
from dynconv_hf.checkpoint_files import check_is_there

from .models import STORIES, base_model, prompt_ids
from .test_config import SMALL


def small_llama(**kwargs):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **kwargs}))


def snapshot(model):
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 12},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nothing_of_llama_is_lost(options, tmp_path):
    base = small_llama(**options).eval()
    for parameter in base.parameters():
        parameter.data.normal_(std=0.3)
    ids = prompt_ids()
    expected = base(ids).logits
    assert torch.equal(retrofit(base, conv_targets="all-linear").eval()(ids).logits, expected)
    base.save_pretrained(tmp_path / "base")
    model = retrofit(tmp_path / "base", conv_targets="all-linear")
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(again) is DynConvLlamaForCausalLM
    assert torch.equal(again(ids).logits, expected)


def test_from_a_model_the_original_is_left_as_it_was():
    base = base_model()
    config, weights, modules = copy.deepcopy(base.config), snapshot(base), dict(base.named_modules())
    model = retrofit(base)
    assert base.config == config and type(base) is LlamaForCausalLM
    assert dict(base.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in base.named_modules())
    for name, (pointer, value) in weights.items():
        assert base.state_dict()[name].data_ptr() == pointer
        assert torch.equal(base.state_dict()[name], value)
    assert model.config is not base.config and model.generation_config is not base.generation_config
    model.train()
    assert base.training is False


def test_from_a_model_the_weights_are_shared_and_not_copied():
    base = base_model()
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    model = retrofit(base)
    new = [name for name, parameter in model.named_parameters() if parameter.data_ptr() not in pointers]
    assert new and all("_conv." in name for name in new)
    assert {p.data_ptr() for p in model.parameters()} >= pointers
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_from_a_model_its_state_comes_along():
    base = base_model(dtype=torch.bfloat16, attn_implementation="eager")
    base.generation_config.temperature = 0.3
    base.model.embed_tokens.weight.requires_grad_(False)
    model = retrofit(base)
    assert model.config._attn_implementation == "eager"
    assert model.generation_config.temperature == 0.3
    assert not model.training and retrofit(base.train()).training
    assert not model.model.embed_tokens.weight.requires_grad
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for n, p in model.named_parameters() if "_conv." in n)


def test_from_a_model_the_result_saves_and_loads(tmp_path):
    model = retrofit(base_model())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is DynConvLlamaForCausalLM
    assert torch.equal(again(prompt_ids()).logits, model(prompt_ids()).logits)


def test_from_pretrained_arguments_pass_through():
    model = retrofit(STORIES, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager" and model.config.dtype == torch.bfloat16
    assert not model.training
    assert retrofit(STORIES, max_position_embeddings=1024).config.max_position_embeddings == 1024


def test_the_result_is_of_the_public_class():
    model = retrofit(STORIES)
    assert type(model) is DynConvLlamaForCausalLM
    assert model.config.architectures == ["DynConvLlamaForCausalLM"]
    assert model.config.conv_init == "identity"
    # Once None, because the class that loads it had another name: training could not be compiled.
    assert model.loss_type == DynConvLlamaForCausalLM(model.config).loss_type == "ForCausalLM"


def test_a_uniform_start_is_not_the_identity_but_has_no_dynamic_part():
    model = retrofit(STORIES, conv_init="uniform")
    conv = model.model.layers[0].self_attn.q_conv
    assert 0.3 < conv.static_filter.abs().max() <= 0.5
    assert conv.basis.abs().max() == 0 and conv.filter_proj.weight.abs().max() > 0
    assert not torch.equal(model(prompt_ids()).logits, base_model()(prompt_ids()).logits)


def test_no_warning_about_missing_weights(caplog):
    retrofit(STORIES)
    assert "MISSING" not in caplog.text


def test_a_config_field_that_does_not_fit():
    with pytest.raises(ValueError, match="conv_rank must be an integer of at least 1, got 0"):
        retrofit(STORIES, conv_rank=0)
    with pytest.raises(TypeError, match=r"no argument 'conv_size'; the convolution is set by .*'conv_targets'"):
        retrofit(STORIES, conv_size=3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1)), "GPT2LMHeadModel has model_type 'gpt2'"),
        (lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)), "supports Llama .*model_type 'qwen2'"),
        (lambda: LlamaModel(LlamaConfig(**SMALL)), "got LlamaModel: give it the LlamaForCausalLM"),
        (lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL)), "got LlamaForSequenceClassification"),
        (lambda: retrofit(small_llama()), "already has dynamic short convolutions"),
        (lambda: torch.nn.Linear(2, 2), "supports Llama .* this Linear has model_type None"),
    ],
)
def test_models_that_are_not_a_llama_for_causal_lm(model, message):
    with pytest.raises(ValueError, match=message):
        retrofit(model())


def test_checkpoints_that_are_not_a_llama(tmp_path):
    Qwen2ForCausalLM(Qwen2Config(**SMALL)).save_pretrained(tmp_path / "qwen2")
    with pytest.raises(ValueError, match=r"supports Llama .*qwen2' has model_type 'qwen2'"):
        retrofit(tmp_path / "qwen2")
    retrofit(small_llama()).save_pretrained(tmp_path / "dynconv")
    with pytest.raises(ValueError, match=r"already has .* load it with AutoModelForCausalLM\.from_pretrained"):
        retrofit(str(tmp_path / "dynconv"))


def test_arguments_held_wrong(tmp_path):
    with pytest.raises(TypeError, match=r"only with a name or path, got \['dtype'\] with a model"):
        retrofit(small_llama(), dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="takes a LlamaForCausalLM, or the name or path of one, got int"):
        retrofit(3)
    with pytest.raises(TypeError, match="instead of config"):
        retrofit(STORIES, config=LlamaConfig())
    with pytest.raises(OSError, match="nowhere"):
        retrofit(tmp_path / "nowhere")


def test_a_model_spread_over_devices_is_refused():
    base = small_llama()
    base.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(
        ValueError, match=r"spread over the devices \['0', '1'\]: call retrofit\(name_or_path, device_map"
    ):
        retrofit(base)


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "~/nowhere", "a/b/nowhere", r"a\nowhere", Path("nowhere")])
def test_a_folder_that_is_not_there(path):
    for function in (retrofit, load_lora, load_conv_adapter):
        with pytest.raises(FileNotFoundError, match=re.escape(f"there is no folder {str(path)!r}")):
            function(path)
    # The command finds out by itself, before it imports the library; all that it is given is text.
    if isinstance(path, str):
        with pytest.raises(FileNotFoundError, match="no such directory"):
            check_exists(path)


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for function in (retrofit, load_lora, load_conv_adapter, lambda path: check_exists(str(path))):
        with pytest.raises(NotADirectoryError):
            function(tmp_path / "model.safetensors")


def test_a_name_on_the_hub_is_no_folder():
    check_is_there("nobody/nothing")


def test_a_field_without_its_prefix():
    with pytest.raises(TypeError, match="say conv_mode='static'"):
        retrofit(STORIES, mode="static")
