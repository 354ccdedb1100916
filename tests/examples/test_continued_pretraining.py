"""The example of continued pretraining: resuming, several processes, and how it treats bad input."""

import json
import subprocess
import sys
from pathlib import Path

import continued_pretraining as example
import pytest
import torch
from datasets import Dataset
from datasets import config as datasets_config
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments, set_seed

from dynconv_hf import DynConvLlamaForCausalLM

ASSETS = Path(example.__file__).parent / "assets"
CHECKPOINT = str(ASSETS / "stories260K")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text((ASSETS / "shakespeare.txt").read_text()[:20_000])
    return str(path)


@pytest.fixture
def blocks(text_file, tokenizer):
    return example.load_blocks(example.DataArguments(text_file=text_file, block_size=64), tokenizer, 512)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def train(directory, tokenizer, blocks, callbacks=None, **changes):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "conv_learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 3,
        "disable_tqdm": True,
    }
    arguments = example.ConvTrainingArguments(output_dir=str(directory), **{**settings, **changes})
    checkpoint = example.checkpoint_to_resume(arguments)
    set_seed(arguments.seed)
    model = example.load_model(example.ModelArguments(CHECKPOINT, conv_rank=3))
    trainer = example.make_trainer(model, tokenizer, blocks, arguments, callbacks)
    example.continue_pretraining(trainer, checkpoint)
    return trainer


def losses(trainer):
    keys = ("loss", "eval_loss")
    return {(entry["step"], key): entry[key] for entry in trainer.state.log_history for key in keys if key in entry}


def test_resumed_equals_uninterrupted(tmp_path, tokenizer, blocks):
    whole = train(tmp_path / "whole", tokenizer, blocks)
    # Without the evaluation at its own end, which the uninterrupted run does not have.
    stopped = train(tmp_path / "stopped", tokenizer, (blocks[0], None), [StopAt(3)], eval_strategy="no")
    assert stopped.state.global_step == 3
    resumed = train(tmp_path / "stopped", tokenizer, blocks, resume_from_checkpoint="true")
    assert resumed.state.global_step == 6
    expected = losses(whole)
    assert {step for step, key in expected if key == "loss"} == {1, 2, 3, 4, 5, 6}
    del expected[2, "eval_loss"]
    assert losses(resumed) == expected
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


def test_what_it_leaves(tmp_path, tokenizer, blocks):
    trainer = train(tmp_path / "out", tokenizer, blocks)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(reloaded, DynConvLlamaForCausalLM)
    for name, parameter in trainer.model.state_dict().items():
        assert torch.equal(parameter, reloaded.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Once").input_ids == tokenizer("Once").input_ids
    history = json.loads((tmp_path / "out" / "loss_curves.json").read_text())[""]
    assert history == trainer.state.log_history
    assert (tmp_path / "out" / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    groups = trainer.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == [1e-3, 1e-3, 1e-2]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]


# Gloo's threads abort a process now and then that ends with its group.
AT_EXIT = f"""
import atexit, runpy, torch
atexit.register(lambda: print("in a group:", torch.distributed.is_initialized()))
runpy.run_path({example.__file__!r}, run_name="__main__")
"""


def test_under_accelerate_launch(tmp_path, text_file):
    script = tmp_path / "launched.py"
    script.write_text(AT_EXIT)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        # With `--cpu`, accelerate starts more than one process only through MPI.
        *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--num_cpu_threads_per_process", "1", "--main_process_port", "0", str(script)),
        *("--model_name_or_path", CHECKPOINT, "--text_file", text_file, "--block_size", "64"),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--per_device_train_batch_size", "2"),
        *("--logging_steps", "1", "--learning_rate", "1e-3", "--conv_learning_rate", "1e-2"),
        *("--use_cpu", "true", "--ddp_backend", "gloo"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("in a group: False") == 2
    assert result.stdout.count("The model, its checkpoints and loss curves are in") == 1
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["train_samples_per_second"] == pytest.approx(3 * 2 * 2 / metrics["train_runtime"], rel=0.01)
    history = json.loads((tmp_path / "out" / "loss_curves.json").read_text())[""]
    trained = [entry["loss"] for entry in history if "loss" in entry]
    assert len(trained) == 3
    assert trained[-1] < trained[0]
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), DynConvLlamaForCausalLM)


def test_blocks_hold_the_text(text_file, tokenizer):
    arguments = example.DataArguments(text_file=text_file, block_size=32, validation_split_percentage=10)
    trained, held_out = example.load_blocks(arguments, tokenizer, 512)
    expected = tokenizer(Path(text_file).read_text()).input_ids
    ids = [token for part in (trained, held_out) for row in part["input_ids"] for token in row]
    assert ids == expected[: len(ids)]
    assert len(expected) - len(ids) < 32
    assert trained["labels"] == trained["input_ids"]
    assert len(held_out) == pytest.approx(0.1 * (len(trained) + len(held_out)), abs=1)


def test_documents_begin_as_the_base_expects(tmp_path, tokenizer):
    path = tmp_path / "three.txt"
    path.write_text("One day.\n--\nTwo days.\n--\n\n--\nThree days.")
    documents = example.load_text_file(str(path), "--\n")
    assert documents["text"] == ["One day.\n", "Two days.\n", "Three days."]
    rows = example.tokenize(documents, tokenizer, append_eos=False, num_workers=None)["input_ids"]
    assert [row.count(tokenizer.bos_token_id) for row in rows] == [1, 1, 1]
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    ended = example.tokenize(documents, tokenizer, append_eos=True, num_workers=None)["input_ids"]
    assert ended == [[*row, tokenizer.eos_token_id] for row in rows]


def test_a_tokenizer_that_marks_nothing_gets_eos(tokenizer):
    silent = AutoTokenizer.from_pretrained(CHECKPOINT)
    silent.backend_tokenizer.post_processor = None
    documents = Dataset.from_dict({"text": ["One day."]})
    (row,) = example.tokenize(documents, silent, append_eos=False, num_workers=None)["input_ids"]
    assert row == [*tokenizer("One day.").input_ids[1:], tokenizer.eos_token_id]
    silent.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        example.tokenize(documents, silent, append_eos=False, num_workers=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_file": "/nowhere.txt"}, "'/nowhere.txt' is not a file"),
        ({"text_file": None}, "either --text_file or --dataset_name"),
        ({"dataset_name": "some/dataset"}, "either --text_file or --dataset_name"),
        ({"block_size": 1024}, "--block_size must be from 2 to 512, the length of the model; got 1024"),
        ({"block_size": 1}, "--block_size must be from 2"),
        ({"block_size": 0}, "--block_size must be from 2 to 512, the length of the model; got 0"),
        ({"validation_split_percentage": 100}, "less than 100, got 100"),
        ({"validation_split_percentage": -1}, "at least 0"),
        ({"document_separator": ""}, "--document_separator must not be empty"),
    ],
)
def test_bad_data_arguments(text_file, tokenizer, changes, message):
    arguments = example.DataArguments(**{"text_file": text_file, **changes})
    with pytest.raises(ValueError, match=message):
        example.load_blocks(arguments, tokenizer, 512)


def test_too_little_text(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("Once upon a time")
    with pytest.raises(ValueError, match="the text gives 0 blocks of 512 tokens"):
        example.load_blocks(example.DataArguments(text_file=str(path)), tokenizer, 512)


def test_bad_model_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"as it is, but \['conv_rank'\] were given"):
        example.load_model(example.ModelArguments(CHECKPOINT, retrofit=False, conv_rank=3))
    example.load_model(example.ModelArguments(CHECKPOINT, conv_targets=["all-linear"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already has dynamic short convolutions: train it with --retrofit false"):
        example.load_model(example.ModelArguments(str(tmp_path)))
    again = example.load_model(example.ModelArguments(str(tmp_path), retrofit=False))
    assert len(again.config.conv_targets) == 7


def test_files_in_the_output_directory_are_safe(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    arguments = TrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="already holds files: choose another one"):
        example.checkpoint_to_resume(arguments)
    arguments.resume_from_checkpoint = "true"
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        example.checkpoint_to_resume(arguments)
    arguments.resume_from_checkpoint = str(tmp_path / "checkpoint-7")
    with pytest.raises(ValueError, match="neither `true` nor the directory of a checkpoint"):
        example.checkpoint_to_resume(arguments)
    elsewhere = tmp_path / "elsewhere" / "checkpoint-7"
    elsewhere.mkdir(parents=True)
    arguments.resume_from_checkpoint = str(elsewhere)
    with pytest.raises(ValueError, match="holds files of a run that"):
        example.checkpoint_to_resume(arguments)
    arguments.output_dir = str(tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match="is not a directory"):
        example.checkpoint_to_resume(arguments)


def test_resuming_another_model_is_an_error(tmp_path):
    example.load_model(example.ModelArguments(CHECKPOINT, conv_rank=3)).save_pretrained(tmp_path)
    same = example.load_model(example.ModelArguments(CHECKPOINT, conv_rank=3))
    example.check_same_model(same.config, str(tmp_path))
    other = example.load_model(example.ModelArguments(CHECKPOINT, conv_rank=4))
    with pytest.raises(ValueError, match="its conv_rank is 3, but 4 is asked for"):
        example.check_same_model(other.config, str(tmp_path))
    plain = example.load_model(example.ModelArguments(CHECKPOINT, retrofit=False))
    with pytest.raises(ValueError, match="its model_type is 'dynconv_llama', but 'llama' is asked for"):
        example.check_same_model(plain.config, str(tmp_path))


def test_errors_on_the_command_line_are_one_line(tmp_path, monkeypatch, text_file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("precious")
    command = ["example", "--model_name_or_path", CHECKPOINT, "--text_file", text_file]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"error: --output_dir .* already holds files"):
        example.main()
    assert (tmp_path / "out" / "model.safetensors").read_text() == "precious"
    command = ["example", "--model_name_or_path", "a/b/nowhere", "--text_file", text_file]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="error: there is no folder 'a/b/nowhere'"):
        example.main()


def test_an_optimizer_with_groups_of_its_own_is_refused(tmp_path, tokenizer, blocks, monkeypatch):
    arguments = example.ConvTrainingArguments(output_dir=str(tmp_path / "out"))
    trainer = example.make_trainer(
        example.load_model(example.ModelArguments(CHECKPOINT)), tokenizer, blocks, arguments
    )
    monkeypatch.setattr(
        trainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.AdamW, {"params": [], "lr": 1e-3})
    )
    with pytest.raises(ValueError, match="makes its own parameter groups"):
        trainer.create_optimizer()


def test_a_frozen_base(tmp_path, text_file, monkeypatch):
    command = ["example", "--model_name_or_path", CHECKPOINT, "--text_file", text_file, "--block_size", "64"]
    options = ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--freeze_base", "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", [*command, *options, "--per_device_train_batch_size", "2"])
    example.main()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base = AutoModelForCausalLM.from_pretrained(CHECKPOINT).state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in base.items())
    moved = [name for name, tensor in trained.items() if name.endswith("basis") and tensor.abs().max() > 0]
    assert len(moved) == 5 * 3
