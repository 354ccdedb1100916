"""What is refused, with nothing left at the destination."""

import json
import logging
import os
import shlex
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dynconv_hf import retrofit, retrofit_checkpoint

from .checkpoints import SMALL, load_tensors, same_tensors, save_llama, save_sparse_llama


@pytest.fixture
def source(tmp_path):
    return save_llama(tmp_path / "base")


def refused(error, message, source, tmp_path, **kwargs):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=message):
        retrofit_checkpoint(source, tmp_path / "made", **kwargs)
    assert sorted(os.listdir(tmp_path)) == before


def edit_config(source, **values):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **values}))


def same_refusal(source, tmp_path, **kwargs):
    with pytest.raises((ValueError, TypeError, OSError)) as expected:
        retrofit(source, **kwargs)
    with pytest.raises(type(expected.value)) as caught:
        retrofit_checkpoint(source, tmp_path / "made", **kwargs)
    assert str(caught.value).replace("retrofit_checkpoint()", "retrofit()") == str(expected.value)
    assert not (tmp_path / "made").exists()


def test_the_same_errors_as_in_memory(source, tmp_path):
    Qwen2ForCausalLM(Qwen2Config(**SMALL)).save_pretrained(tmp_path / "qwen2")
    same_refusal(tmp_path / "qwen2", tmp_path)
    retrofit_checkpoint(source, tmp_path / "dynconv")
    same_refusal(tmp_path / "dynconv", tmp_path)
    same_refusal(tmp_path / "nowhere", tmp_path)
    same_refusal(source, tmp_path, conv_rank=0)
    same_refusal(source, tmp_path, conv_size=3)
    same_refusal(source, tmp_path, conv_targets=["w_proj"])


def test_an_unknown_argument(source, tmp_path):
    refused(TypeError, "knows no argument 'dtype'; for the Hub:.*'revision'", source, tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(name, source, tmp_path):
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(b"")
    refused(FileNotFoundError, f"only {name}. This converts pickled weights: python -c", source, tmp_path)


def test_the_command_converts(source, tmp_path, monkeypatch):
    tensors = load_tensors(source)
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        retrofit_checkpoint(source, tmp_path / "made")
    python, option, program = shlex.split(str(caught.value).partition("pickled weights: ")[2])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert same_tensors(load_tensors(tmp_path / "base-safetensors"), tensors)
    retrofit_checkpoint(tmp_path / "base-safetensors", tmp_path / "made")


def test_no_weights_at_all(source, tmp_path):
    (source / "model.safetensors").unlink()
    refused(FileNotFoundError, "neither model.safetensors nor", source, tmp_path)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_a_variant(shard_size, source, tmp_path):
    LlamaForCausalLM.from_pretrained(source).save_pretrained(
        tmp_path / "half", variant="fp16", max_shard_size=shard_size
    )
    refused(FileNotFoundError, r"There is model\..*fp16.*: give variant='fp16'$", tmp_path / "half", tmp_path)
    refused(FileNotFoundError, "variant='bf16', neither model.bf16", tmp_path / "half", tmp_path, variant="bf16")
    made = retrofit_checkpoint(tmp_path / "half", tmp_path / "made", variant="fp16")
    kept = {name: tensor for name, tensor in load_tensors(made).items() if "_conv." not in name}
    assert same_tensors(kept, load_tensors(source))


def test_weights_of_another_format(source, tmp_path):
    (source / "model.safetensors").rename(source / "model.gguf")
    refused(FileNotFoundError, r"There is model.gguf: load it with .*gguf_file='model.gguf'", source, tmp_path)


def test_an_adapter_beside_the_model(source, tmp_path):
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere"}')
    same_refusal(source, tmp_path)
    refused(ValueError, r"holds an adapter of 'somewhere'.*dynconv_hf\.load_lora", source, tmp_path)


def test_a_missing_shard(tmp_path):
    source = save_llama(tmp_path / "base", shard_size="20KB")
    next(source.glob("model-00002*")).unlink()
    refused(FileNotFoundError, "index.json names model-00002.*not there", source, tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": 1}']
)
def test_a_damaged_index(index, tmp_path):
    source = save_llama(tmp_path / "base", shard_size="20KB")
    (source / "model.safetensors.index.json").write_text(index)
    refused(ValueError, r"index\.json (is not an index|must name files beside it)", source, tmp_path)


def test_a_file_cut_off(source, tmp_path):
    size = (source / "model.safetensors").stat().st_size
    os.truncate(source / "model.safetensors", size - 1)
    refused(ValueError, "model.safetensors is not a whole safetensors file", source, tmp_path)
    os.truncate(source / "model.safetensors", 5)
    refused(ValueError, "model.safetensors is not a whole safetensors file", source, tmp_path)


def test_weights_that_do_not_fit_the_config(source, tmp_path):
    edit_config(source, num_hidden_layers=4)
    refused(ValueError, r"no weights for 9 tensors .* model\.layers\.3\.input_layernorm", source, tmp_path)
    edit_config(source, num_hidden_layers=3, intermediate_size=56)
    refused(ValueError, r"down_proj\.weight of shape \(32, 48\), .* says \(32, 56\)", source, tmp_path)


def test_weights_without_an_output_head(source, tmp_path):
    model = LlamaForCausalLM.from_pretrained(source).model
    model.save_pretrained(tmp_path / "headless")
    refused(ValueError, "no weights for", tmp_path / "headless", tmp_path)


def test_a_quantised_checkpoint(source, tmp_path):
    edit_config(source, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(ValueError, r"quantised \(bitsandbytes\): give the checkpoint it was made from", source, tmp_path)


def test_tensors_that_no_llama_has_are_told_of(source, tmp_path, caplog, monkeypatch):
    from safetensors.torch import save_file

    save_file({**load_tensors(source), "extra": torch.ones(1)}, source / "model.safetensors")
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    retrofit_checkpoint(source, tmp_path / "made")
    assert "1 tensors that no Llama has, extra the first: left out" in caplog.text
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert "extra" not in index["weight_map"]


MEASURE = """
import resource, sys, time
import dynconv_hf
started = time.perf_counter()
dynconv_hf.retrofit_checkpoint(sys.argv[1], sys.argv[2])
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_and_time_do_not_depend_on_the_base(tmp_path):
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 8}
    source = save_sparse_llama(tmp_path / "base", shards=3, num_hidden_layers=24, vocab_size=32000, **sizes)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert weights > 8 * 2**30
    command = [sys.executable, "-c", MEASURE, source, tmp_path / "made"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, peak = map(float, output.split())
    convs = max(tmp_path.glob("made/*.safetensors"), key=lambda path: path.name).stat().st_size
    assert peak < 2**30 + convs
    assert seconds < 30
