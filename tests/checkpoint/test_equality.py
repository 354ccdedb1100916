"""What retrofit_checkpoint writes is what retrofit().save_pretrained() writes."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynconv_hf import DynConvLlamaForCausalLM, retrofit, retrofit_checkpoint

from ..modeling.models import PROMPT, STORIES, prompt_ids
from .checkpoints import load_tensors, same_tensors, save_llama

MODES = ("lowrank", "headwise", "static")


def check_equal(source, tmp_path, **conv):
    made, expected = tmp_path / "made" / "model", tmp_path / "expected" / "model"
    torch.manual_seed(1)
    retrofit_checkpoint(source, made, **conv)
    torch.manual_seed(1)
    retrofit(source, **conv).save_pretrained(expected)
    assert same_tensors(load_tensors(made), load_tensors(expected))
    # Config, generation config, code, card: everything but the tokenizer and how the tensors are spread over files.
    for path in expected.iterdir():
        assert "safetensors" in path.name or (made / path.name).read_bytes() == path.read_bytes(), path.name
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensor_for_tensor(mode, tied, shard_size, dtype, tmp_path):
    source = save_llama(tmp_path / "base", dtype=dtype, shard_size=shard_size, tie_word_embeddings=tied)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    check_equal(source, tmp_path, conv_mode=mode, conv_targets="all-linear", conv_init="uniform", conv_head_size=8)


@pytest.mark.parametrize(
    "options",
    [
        {"conv_layers": [0, 2], "conv_targets": ["k_proj", "down_proj"], "conv_kernel_size": 3, "conv_rank": 2},
        {"conv_init": "identity", "conv_targets": "all-linear"},
        {"conv_static": False, "conv_init": "uniform"},
        {"conv_residual": False, "conv_init": "uniform"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option(options, tmp_path):
    check_equal(save_llama(tmp_path / "base"), tmp_path, **options)


def test_the_config_of_the_base_goes_through(tmp_path):
    source = save_llama(tmp_path / "base", attention_bias=True, mlp_bias=True, head_dim=12, rms_norm_eps=1e-3)
    check_equal(source, tmp_path)


def test_a_config_that_names_no_dtype(tmp_path):
    source = save_llama(tmp_path / "base", dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    made = check_equal(source, tmp_path)
    assert {tensor.dtype for tensor in load_tensors(made).values()} == {torch.bfloat16}


def test_what_is_made_loads_and_starts_as_the_base(tmp_path):
    made = retrofit_checkpoint(STORIES, tmp_path / "made", conv_targets="all-linear")
    model, info = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert type(model) is DynConvLlamaForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    base = AutoModelForCausalLM.from_pretrained(STORIES)
    assert torch.equal(model(prompt_ids()).logits, base(prompt_ids()).logits)
    assert AutoTokenizer.from_pretrained(made)(PROMPT).input_ids == prompt_ids()[0].tolist()


def test_the_index_counts_what_there_is(tmp_path):
    source = save_llama(tmp_path / "base", shard_size="20KB", tie_word_embeddings=True)
    made = retrofit_checkpoint(source, tmp_path / "made")
    index = json.loads((made / "model.safetensors.index.json").read_text())
    tensors = load_tensors(made)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    shards = sorted(path.name for path in made.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    convs = {file for name, file in index["weight_map"].items() if "_conv." in name}
    assert convs == {shards[-1]}


def test_what_belongs_to_the_model_comes_along(tmp_path):
    source = tmp_path / "base"
    shutil.copytree(STORIES, source)
    companions = {
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "LICENSE.txt": "licence",
        "USE_POLICY.md": "policy",
        "special_tokens_map.json": "{}",
    }
    for name, text in companions.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    # Code of the base cannot run the new model, which has a card of its own.
    for name in ("modeling_other.py", "optimizer.pt"):
        (source / name).write_text("no")
    (source / "README.md").write_text("---\nlicense: mit\n---\n\nThe base")
    made = retrofit_checkpoint(source, tmp_path / "made")
    for name in (*companions, "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
        assert not (made / name).samefile(source / name)
    assert not any((made / name).exists() for name in ("modeling_other.py", "optimizer.pt"))
    card = (made / "README.md").read_text()
    assert "license: mit" in card and "# made" in card and "The base" not in card


def test_every_file_can_be_read_by_who_can_read_the_base(tmp_path):
    source = save_llama(tmp_path / "base")
    (source / "model.safetensors").chmod(0o644)
    made = retrofit_checkpoint(source, tmp_path / "made")
    assert {oct(path.stat().st_mode & 0o777) for path in made.glob("*.safetensors")} == {oct(0o644)}


def test_buffers_of_old_checkpoints_are_not_indexed(tmp_path, caplog):
    from safetensors.torch import save_file

    source = save_llama(tmp_path / "base")
    tensors = load_tensors(source)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = retrofit_checkpoint(source, tmp_path / "made")
    assert "left out" not in caplog.text
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert not any("inv_freq" in name for name in index["weight_map"])
    AutoModelForCausalLM.from_pretrained(made)
