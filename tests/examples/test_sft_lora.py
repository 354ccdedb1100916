"""The example of supervised fine-tuning: packed examples that do not see each other, the adapter that it leaves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="the example needs TRL")

import sft_lora as example
from datasets import Dataset
from datasets import config as datasets_config
from transformers import AutoTokenizer

from dynconv_hf import freeze_base, load_lora, retrofit

ASSETS = Path(example.__file__).parent / "assets"
CHECKPOINT = str(ASSETS / "stories260K")
TEXT = str(ASSETS / "shakespeare.txt")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def config(tmp_path, **changes):
    settings = {
        "max_steps": 3,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "conv_learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return example.ConvSFTConfig(output_dir=str(tmp_path / "out"), **{**settings, **changes})


def trainer(tmp_path, tokenizer, model=None, **changes):
    examples = example.load_examples(example.DataArguments(text_file=TEXT, max_examples=40))
    model = retrofit(CHECKPOINT, conv_targets="all-linear") if model is None else model
    return example.make_trainer(
        model, tokenizer, examples, config(tmp_path, **changes), example.LoraArguments(lora_r=4)
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_examples_do_not_see_each_other(tmp_path, tokenizer, attention):
    base = retrofit(CHECKPOINT, conv_targets="all-linear", attn_implementation=attention)
    sft = trainer(tmp_path, tokenizer, base, max_length=256)
    for parameter in sft.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.02)
    batch = max(sft.get_train_dataloader(), key=lambda batch: (batch["position_ids"] == 0).sum())
    model = sft.model.eval()
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 4
    with torch.no_grad():
        packed = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits[0]
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            alone = model(batch["input_ids"][:, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-3)


def test_the_adapter_it_leaves(tmp_path, tokenizer):
    sft = trainer(tmp_path, tokenizer)
    sft.train()
    sft.save_model()
    assert [group["initial_lr"] for group in sft.optimizer.param_groups] == [1e-3, 1e-2]
    ids = torch.arange(3, 40)[None]
    loaded = load_lora(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, sft.model.eval()(ids).logits)
    assert not torch.equal(loaded(ids).logits, retrofit(CHECKPOINT)(ids).logits)


def test_a_frozen_base_is_accepted(tmp_path, tokenizer):
    model = freeze_base(retrofit(CHECKPOINT))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    examples = example.load_examples(example.DataArguments(text_file=TEXT, max_examples=40))
    sft = example.ConvSFTTrainer(
        model=model, args=config(tmp_path), train_dataset=examples, processing_class=tokenizer
    )
    sft.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == {name for name in before if "_conv." in name}


def test_the_command(tmp_path):
    command = [sys.executable, example.__file__, "--model_name_or_path", CHECKPOINT, "--text_file", TEXT]
    options = ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--max_length", "64", "--max_examples", "50"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "dynconv_hf.load_lora()" in result.stdout
    load_lora(tmp_path / "out")
    again = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("error: --output_dir")


def test_paragraphs_are_paired():
    pairs = example.paragraph_pairs("Ber.\nWho's there?\n\n\nFran.\nNay.\n\nBer.\nLong live!")
    assert pairs[:] == {
        "prompt": ["Ber.\nWho's there?\n\n", "Fran.\nNay.\n\n"],
        "completion": ["Fran.\nNay.", "Ber.\nLong live!"],
    }


def test_json_lines(tmp_path):
    path = tmp_path / "examples.jsonl"
    Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"]}).to_json(path)
    assert len(example.load_examples(example.DataArguments(json_file=str(path), max_examples=1))) == 1
    Dataset.from_dict({"question": ["a"]}).to_json(path)
    with pytest.raises(ValueError, match=r"need `prompt` and `completion`.*they have \['question'\]"):
        example.load_examples(example.DataArguments(json_file=str(path)))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="give one of --text_file, --json_file and --dataset_name, got none"):
        example.load_examples(example.DataArguments())
    with pytest.raises(ValueError, match="--text_file '/nowhere' is not a file"):
        example.load_examples(example.DataArguments(text_file="/nowhere"))
    with pytest.raises(ValueError, match="--max_examples must be at least 1, got 0"):
        example.load_examples(example.DataArguments(text_file=TEXT, max_examples=0))
    with pytest.raises(ValueError, match="the text has 1 paragraphs"):
        example.paragraph_pairs("one")
    with pytest.raises(ValueError, match="either --load_in_4bit or --load_in_8bit, got both"):
        example.quantization(example.LoraArguments(load_in_4bit=True, load_in_8bit=True), "auto")
    with pytest.raises(ValueError, match="--packing_strategy wrapped cuts examples without a mark"):
        config(tmp_path, packing_strategy="wrapped")
