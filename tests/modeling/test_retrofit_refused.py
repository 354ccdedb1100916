"""retrofit(): what a Llama may have that the result could not keep, and arguments and folders of other kinds."""

import peft
import pytest
import torch
from torch.nn.utils import parametrizations, parametrize
from transformers import LlamaConfig, LlamaForCausalLM

from dynconv_hf import (
    DynConvLlamaForCausalLM,
    freeze_base,
    lora_config,
    retrofit,
    retrofit_checkpoint,
    save_conv_adapter,
)

from .models import prompt_ids
from .test_config import SMALL
from .test_retrofit import small_llama


class HalvedLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


class OnlyRenamed(LlamaForCausalLM): ...


def with_adapter(model):
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))


def with_parametrisation(model):
    parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)


def with_a_layer_cut(model):
    model.model.layers = model.model.layers[:1]


def with_a_bias(model):
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)


def with_more_tokens(model):
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features + 1, bias=False)


def with_a_forward(model):
    model.model.layers[0].mlp.forward = lambda x: x


def with_another_mlp(model):
    model.model.layers[1].mlp = torch.nn.Identity()


def with_another_scaling(model):
    model.model.layers[1].self_attn.scaling = 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_adapter, r"has an adapter \(model\.layers\.0\.self_attn\.q_proj is PEFT's .*lora_config"),
        (with_parametrisation, r"model\.layers\.1\.mlp\.up_proj is parametrised \(weight\).*remove_parametrizations"),
        (with_a_layer_cut, r"has 1 layers, .* model\.config\.num_hidden_layers = 1"),
        (with_a_bias, r"has a weight lm_head\.bias"),
        (with_more_tokens, r"lm_head\.weight has shape .*resize_token_embeddings"),
        (with_a_forward, r"model\.layers\.0\.mlp is a LlamaMLP with a forward of its own"),
        (with_another_scaling, r"model\.layers\.1\.self_attn\.scaling is 0\.5, but its config"),
        (with_another_mlp, r"model\.layers\.1\.mlp is a Identity with a forward of its own"),
    ],
)
def test_what_would_be_lost(change, message):
    base = small_llama()
    change(base)
    with pytest.raises(ValueError, match=message):
        retrofit(base)


def test_the_way_that_the_messages_name():
    ids = prompt_ids()
    cut = small_llama()
    with_a_layer_cut(cut)
    cut.config.num_hidden_layers = 1
    parametrised = small_llama()
    with_parametrisation(parametrised)
    parametrize.remove_parametrizations(parametrised.model.layers[1].mlp.up_proj, "weight")
    adapted = peft.get_peft_model(small_llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for base in (cut, parametrised, adapted.merge_and_unload()):
        assert torch.equal(retrofit(base.eval())(ids).logits, base(ids).logits)


def test_a_subclass_with_a_forward():
    with pytest.raises(ValueError, match="HalvedLogits with a forward of its own"):
        retrofit(HalvedLogits(LlamaConfig(**SMALL)))
    assert type(retrofit(OnlyRenamed(LlamaConfig(**SMALL)))) is DynConvLlamaForCausalLM


def test_no_module_with_a_state_is_shared():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    base = small_llama(rope_parameters=rope, max_position_embeddings=16).eval()
    model = retrofit(base)
    before = base.model.rotary_emb.inv_freq.clone()
    model(torch.ones(1, 24, dtype=torch.long))
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    assert torch.equal(base.model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arguments_of_from_pretrained(dtype, tmp_path):
    small_llama().to(dtype).save_pretrained(tmp_path)
    model, info = retrofit(tmp_path, dtype="auto", output_loading_info=True)
    assert type(model) is DynConvLlamaForCausalLM and model.config.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(TypeError, match=r"no gguf_file, got 'a\.gguf': load the Llama first"):
        retrofit(tmp_path, gguf_file="a.gguf")
    with pytest.raises(ValueError, match=r"GGUF knows no convolutions\. Load the Llama"):
        DynConvLlamaForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf")


def test_folders_of_adapters(tmp_path):
    small_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    retrofit(base).save_pretrained(tmp_path / "dynconv")
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"holds an adapter of .*base'.*dynconv_hf\.load_lora"):
        retrofit(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no weights for .* parameters of convolutions.*load_lora"):
        DynConvLlamaForCausalLM.from_pretrained(tmp_path / "plain")
    save_conv_adapter(freeze_base(retrofit(tmp_path / "base")), tmp_path / "convs")
    for function in (retrofit, lambda source: retrofit_checkpoint(source, tmp_path / "new")):
        with pytest.raises(ValueError, match=r"holds the convolutions for .*base'.*load_conv_adapter\('.*convs'\)"):
            function(tmp_path / "convs")

    model = DynConvLlamaForCausalLM.from_pretrained(tmp_path / "dynconv")
    adapted = peft.get_peft_model(model, lora_config(model, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "lora")
    again = DynConvLlamaForCausalLM.from_pretrained(tmp_path / "lora").eval()
    assert torch.equal(again(prompt_ids()).logits, adapted(prompt_ids()).logits)
