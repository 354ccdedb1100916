"""What users of transformers do with any model: save, load, resize, inspect, compile, put in a pipeline."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    CompileConfig,
    LlamaForCausalLM,
    pipeline,
)

import dynconv_hf
from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM, retrofit

from .models import STORIES, VARIANTS, base_model, move_convs, moved_model, prompt_ids, random_ids
from .test_config import SMALL

variants = pytest.mark.parametrize(("mode", "targets"), VARIANTS)


def small_model(**kwargs):
    torch.manual_seed(0)
    config = {**SMALL, "conv_head_size": 4, **kwargs}
    return move_convs(DynConvLlamaForCausalLM(DynConvLlamaConfig(**config))).eval()


def assert_same_model(actual, expected):
    assert type(actual) is type(expected)
    state = actual.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(actual(prompt_ids()).logits, expected(prompt_ids()).logits)


@variants
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(mode, targets, tied, tmp_path):
    model = small_model(conv_mode=mode, conv_targets=targets, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(again, model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "dynconv_llama"


def test_save_and_load_in_shards(tmp_path):
    model = small_model(conv_targets="all-linear")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_load_with_a_device_map(device_map, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map), model)


def test_load_in_another_dtype(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(prompt_ids()).logits.isfinite().all()


def test_names_of_the_checkpoint_are_stable():
    names = set(small_model(conv_targets="all-linear", num_hidden_layers=1).state_dict())
    convs = {"self_attn.q_conv", "self_attn.k_conv", "self_attn.v_conv", "self_attn.o_conv"}
    convs |= {"mlp.gate_conv", "mlp.up_conv", "mlp.down_conv"}
    parameters = ("basis", "static_filter", "filter_proj.weight")
    expected = {f"model.layers.0.{conv}.{parameter}" for conv in convs for parameter in parameters}
    assert {name for name in names if "_conv." in name} == expected


@pytest.mark.parametrize(
    ("auto_class", "name"),
    [
        (AutoModel, "DynConvLlamaModel"),
        (AutoModelForCausalLM, "DynConvLlamaForCausalLM"),
        (AutoModelForSequenceClassification, "DynConvLlamaForSequenceClassification"),
        (AutoModelForTokenClassification, "DynConvLlamaForTokenClassification"),
        (AutoModelForQuestionAnswering, "DynConvLlamaForQuestionAnswering"),
    ],
)
def test_every_head_from_config_from_a_language_model_and_back(auto_class, name, tmp_path):
    config = DynConvLlamaConfig(**SMALL, pad_token_id=0)
    assert type(auto_class.from_config(config)) is getattr(dynconv_hf, name)
    language_model = small_model(pad_token_id=0)
    language_model.save_pretrained(tmp_path / "language_model")
    model = auto_class.from_pretrained(tmp_path / "language_model").eval()
    assert type(model) is getattr(dynconv_hf, name)
    body = model if auto_class is AutoModel else model.model
    assert torch.equal(body.layers[0].self_attn.q_conv.basis, language_model.model.layers[0].self_attn.q_conv.basis)
    with torch.no_grad():
        outputs = model(random_ids(2, 5))
        model.save_pretrained(tmp_path / "again")
        again = auto_class.from_pretrained(tmp_path / "again").eval()(random_ids(2, 5))
    assert torch.equal(outputs[0], again[0])


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.tensor([[0, 1, 1, 0, 1]] * 2)])
def test_heads_train(labels):
    name = "Sequence" if labels.ndim == 1 else "Token"
    model_class = getattr(dynconv_hf, f"DynConvLlamaFor{name}Classification")
    model = model_class(DynConvLlamaConfig(**SMALL, pad_token_id=0))
    model(random_ids(2, 5), labels=labels).loss.backward()
    assert model.model.layers[0].self_attn.q_conv.static_filter.grad.abs().max() > 0


def test_a_plain_llama_is_refused_with_the_way_out(tmp_path):
    for model_class in (DynConvLlamaForCausalLM, dynconv_hf.DynConvLlamaForSequenceClassification):
        with pytest.raises(ValueError, match=r"is a plain Llama checkpoint.*dynconv_hf\.retrofit\('.*stories260K'\)"):
            model_class.from_pretrained(STORIES)


def test_weights_that_do_not_cover_the_config_are_refused(tmp_path):
    small_model().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.conv_targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    with pytest.raises(ValueError, match=r"no weights for 9 parameters of convolutions.*self_attn\.o_conv\.basis"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match=r"no weights for .* parameters of convolutions"):
        DynConvLlamaForCausalLM.from_pretrained(STORIES, config=retrofit(STORIES).config)


def test_loading_info_is_still_to_be_had(tmp_path):
    small_model().save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is DynConvLlamaForCausalLM and not info["missing_keys"]


def test_resize_token_embeddings(tmp_path):
    model = moved_model()
    before = model(prompt_ids()).logits
    model.resize_token_embeddings(520)
    after = model(prompt_ids()).logits
    assert after.shape[-1] == 520 and torch.equal(after[..., :512], before)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight.shape[0] == 520


@pytest.mark.parametrize("use_cache", [True, False])
def test_attentions_and_hidden_states(use_cache):
    model, base, ids = (
        retrofit(STORIES, attn_implementation="eager"),
        base_model(attn_implementation="eager"),
        prompt_ids(),
    )
    options = {"output_attentions": True, "output_hidden_states": True, "use_cache": use_cache}
    outputs, expected = model(ids, **options), base(ids, **options)
    assert len(outputs.attentions) == 5 and len(outputs.hidden_states) == 6
    for actual, wanted in zip(
        outputs.attentions + outputs.hidden_states, expected.attentions + expected.hidden_states, strict=True
    ):
        assert torch.equal(actual, wanted)


def test_meta_device():
    with init_empty_weights():
        model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**SMALL))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with torch.device("meta"):
        model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**SMALL))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_fresh_models_start_as_in_the_paper():
    torch.manual_seed(0)
    model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**SMALL, conv_targets="all-linear"))
    for name, parameter in model.named_parameters():
        if name.endswith("basis"):
            assert parameter.abs().max() == 0
        if name.endswith("static_filter"):
            assert 0.4 < parameter.abs().max() <= 0.5
        if name.endswith("filter_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)


def test_llama_is_not_changed():
    """Importing the package registers new models; the old ones stay what they are."""
    assert type(AutoModelForCausalLM.from_pretrained(STORIES)) is LlamaForCausalLM


def test_text_generation_pipeline(tmp_path, caplog):
    moved_model().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    text = generator("Once upon a time", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith("Once upon a time") and len(text) > len("Once upon a time")
    assert "not supported" not in caplog.text


@variants
def test_compiled_forward_and_training(mode, targets):
    """aot_eager traces forward and backward as inductor does, without its minutes of C++ compilation."""
    torch.compiler.reset()
    model = small_model(conv_mode=mode, conv_targets=targets, num_hidden_layers=1).train()
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    eager = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    eager.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(ids, attention_mask=mask, labels=ids, use_cache=False)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits, eager.logits)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_compiled_by_inductor():
    torch.compiler.reset()
    model = small_model(num_hidden_layers=1)
    ids = random_ids(1, 8)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(compiled, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_compiled_generation_with_a_static_cache():
    torch.compiler.reset()
    model, options = small_model(num_hidden_layers=1), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :4] = 0
    expected = model.generate(ids, attention_mask=mask, **options)
    compiled = model.generate(
        ids,
        attention_mask=mask,
        **options,
        cache_implementation="static",
        compile_config=CompileConfig(backend="aot_eager", fullgraph=True, mode=None),
    )
    assert torch.equal(compiled, expected)
