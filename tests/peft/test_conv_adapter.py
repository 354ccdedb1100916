"""Convolution adapters: the convolutions alone, put back onto the Llama they were trained with."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.hf_api import CommitInfo, RepoUrl
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dynconv_hf import (
    DynConvLlamaForCausalLM,
    freeze_base,
    load_conv_adapter,
    load_lora,
    lora_config,
    push_conv_adapter,
    retrofit,
    save_conv_adapter,
)

from ..modeling.models import STORIES, VARIANTS, base_model, move_convs, moved_model
from ..modeling.test_config import SMALL
from .models import in_new_process, logits, loss, train


def frozen(mode: str = "lowrank", targets: list[str] | str = "all-linear", **conv) -> DynConvLlamaForCausalLM:
    return freeze_base(moved_model(mode, targets, **conv))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_trained_on_text_and_loaded_in_a_new_process(tmp_path, capsys):
    base_file = Path(STORIES) / "model.safetensors"
    before = digest(base_file)
    model = freeze_base(retrofit(STORIES))
    start = loss(model)
    end = train(model, steps=30)
    weights = save_conv_adapter(model, tmp_path / "adapter")
    code = """
from tests.peft.models import loss
model = dynconv_hf.load_conv_adapter(sys.argv[1])
print(loss(model).hex())
"""
    assert float.fromhex(in_new_process(code, tmp_path / "adapter").split()[-1]) == end
    assert end < start - 0.5
    assert digest(base_file) == before
    with capsys.disabled():
        size = weights.stat().st_size
        print(
            f"\nconvolution adapter: {size:,} bytes beside {base_file.stat().st_size:,}; loss {start:.3f} to {end:.3f}"
        )


@pytest.mark.parametrize(("mode", "targets"), VARIANTS)
@pytest.mark.parametrize("layers", [None, [0, 4]], ids=["all layers", "two layers"])
def test_saved_and_loaded(mode, targets, layers, tmp_path):
    model = frozen(mode, targets, conv_layers=layers)
    weights = save_conv_adapter(model, tmp_path / "adapter")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert load_file(weights).keys() == trained.keys()
    loaded = load_conv_adapter(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained.keys()
    base = base_model()
    assert torch.equal(logits(load_conv_adapter(tmp_path / "adapter", base)), logits(model))
    assert type(base) is LlamaForCausalLM and torch.equal(logits(base), logits(base_model()))


def test_without_a_residual_or_a_static_filter(tmp_path):
    model = frozen(conv_residual=False, conv_static=False, conv_init="uniform", conv_kernel_size=3)
    save_conv_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_conv_adapter(tmp_path / "adapter")), logits(model))


def test_the_record(tmp_path):
    model = frozen()
    model.config._commit_hash = "abc"
    save_conv_adapter(model, tmp_path / "own")
    record = json.loads((tmp_path / "own" / "conv_adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == STORIES and record["revision"] == "abc"
    assert record["conv_targets"] == model.config.conv_targets
    assert "base_model:" not in (tmp_path / "own" / "README.md").read_text()
    save_conv_adapter(model, tmp_path / "named", base_model_name_or_path="someone/llama")
    record = json.loads((tmp_path / "named" / "conv_adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == "someone/llama" and record["revision"] is None
    assert "base_model: someone/llama\n" in (tmp_path / "named" / "README.md").read_text()
    assert torch.equal(logits(load_conv_adapter(tmp_path / "named", STORIES)), logits(model))


def test_the_base_can_be_a_checkpoint_with_convolutions(tmp_path):
    model = frozen()
    save_conv_adapter(model, tmp_path / "adapter")
    move_convs(frozen(), seed=1).save_pretrained(tmp_path / "other")
    assert torch.equal(logits(load_conv_adapter(tmp_path / "adapter", tmp_path / "other")), logits(model))
    frozen(conv_rank=3).save_pretrained(tmp_path / "rank3")
    with pytest.raises(ValueError, match="its conv_rank is 15, but that of the base is 3"):
        load_conv_adapter(tmp_path / "adapter", tmp_path / "rank3")
    with pytest.raises(ValueError, match="has convolutions already, which the adapter would overwrite"):
        load_conv_adapter(tmp_path / "adapter", model)


def test_each_loader_points_at_the_other(tmp_path):
    model = frozen()
    save_conv_adapter(model, tmp_path / "convs")
    get_peft_model(model, lora_config(model, r=2)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"convs' has no adapter_config.json.*dynconv_hf.load_conv_adapter\(\)"):
        load_lora(tmp_path / "convs")
    with pytest.raises(ValueError, match=r"lora' has no conv_adapter_config.json.*dynconv_hf.load_lora\(\)"):
        load_conv_adapter(tmp_path / "lora")


def test_dtypes_are_kept(tmp_path):
    model = frozen()
    save_conv_adapter(model, tmp_path / "adapter")
    loaded = load_conv_adapter(tmp_path / "adapter", dtype=torch.bfloat16)
    dtypes = {"_conv." in name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    save_conv_adapter(loaded.to(torch.bfloat16), tmp_path / "half")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "conv_adapter.safetensors").values()} == {
        torch.bfloat16
    }


def test_of_a_wrapped_model(tmp_path):
    model = frozen()
    save_conv_adapter(torch.compile(model), tmp_path / "compiled")
    save_conv_adapter(nn.ModuleDict({"wrapped": model}), tmp_path / "wrapped")
    for name in ("compiled", "wrapped"):
        assert torch.equal(logits(load_conv_adapter(tmp_path / name)), logits(model))


def test_models_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is made of a DynConvLlamaForCausalLM, got LlamaForCausalLM"):
        save_conv_adapter(base_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is not frozen"):
        save_conv_adapter(moved_model(), tmp_path / "adapter")
    model = frozen()
    model = get_peft_model(model, lora_config(model))
    with pytest.raises(ValueError, match="has PEFT adapters"):
        save_conv_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_safe(tmp_path):
    model = frozen()
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files that are no convolution adapter"):
            save_conv_adapter(model, tmp_path, overwrite=overwrite)
        with pytest.raises(ValueError, match="is not a directory"):
            save_conv_adapter(model, tmp_path / "thesis.txt", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_adapter_is_overwritten_only_if_asked(tmp_path):
    model = frozen()
    (tmp_path / "adapter").mkdir()
    save_conv_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("written by hand")
    expected = logits(model)
    other = move_convs(frozen(conv_rank=3), seed=1)
    with pytest.raises(FileExistsError, match="holds a convolution adapter"):
        save_conv_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(load_conv_adapter(tmp_path / "adapter")), expected)
    save_conv_adapter(other, tmp_path / "adapter", overwrite=True)
    assert torch.equal(logits(load_conv_adapter(tmp_path / "adapter")), logits(other))
    assert (tmp_path / "adapter" / "README.md").read_text() == "written by hand"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynconv_hf.conv_adapter.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_conv_adapter(frozen(), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_do_not_fit(tmp_path):
    directory = tmp_path / "adapter"
    save_conv_adapter(frozen(), directory)
    wider = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 5}))
    with pytest.raises(ValueError, match=r"does not fit this base: .*basis has shape \(15, 4, 64\), but must have"):
        load_conv_adapter(directory, wider)
    with pytest.raises(ValueError, match="does not fit this base: has no place for"):
        load_conv_adapter(directory, LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 2})))
    with pytest.raises(ValueError, match=r"does not fit this base: lacks 21 tensors, model\.layers\.5"):
        load_conv_adapter(directory, LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 6})))
    rewrite(directory / "conv_adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not name its base: give `base`"):
        load_conv_adapter(directory)


def test_damaged_adapters(tmp_path):
    directory = tmp_path / "adapter"
    save_conv_adapter(frozen(), directory)
    config, weights = directory / "conv_adapter_config.json", directory / "conv_adapter.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        load_conv_adapter(directory)
    save_file({"another": torch.ones(2)}, weights)
    with pytest.raises(ValueError, match="has no place for 1 tensors, another the first"):
        load_conv_adapter(directory)
    rewrite(config, conv_color="red")
    with pytest.raises(ValueError, match="is not the config of a convolution adapter"):
        load_conv_adapter(directory)
    config.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_conv_adapter(directory)
    os.remove(config)
    with pytest.raises(OSError, match=r"conv_adapter_config\.json"):
        load_conv_adapter(directory)


def test_pushed_alone(tmp_path, monkeypatch):
    calls = {}

    def create_repo(self, repo_id, **options):
        calls["create_repo"] = (repo_id, options)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, **options):
        calls["upload_folder"] = options
        return CommitInfo(
            commit_url="https://huggingface.co/me/convs/commit/1", commit_message="", commit_description="", oid="1"
        )

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    save_conv_adapter(frozen(), tmp_path / "adapter")
    assert push_conv_adapter(tmp_path / "adapter", "me/convs", private=True).endswith("me/convs/commit/1")
    assert calls["create_repo"] == ("me/convs", {"private": True, "exist_ok": True})
    assert calls["upload_folder"]["repo_id"] == "me/convs"
    assert calls["upload_folder"]["allow_patterns"] == [
        "conv_adapter.safetensors",
        "conv_adapter_config.json",
        "README.md",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"conv_adapter_config\.json"):
        push_conv_adapter(tmp_path / "empty", "me/convs")
