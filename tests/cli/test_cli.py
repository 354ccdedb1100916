"""The dynconv command as a user runs it: in a process of its own, in a terminal of 80 columns."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from typing import get_args

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from dynconv_hf import freeze_base, lora_config, retrofit, retrofit_checkpoint, save_conv_adapter
from dynconv_hf.modeling.configuration_dynconv_llama import CONV_MODES, CONV_TARGETS

from ..checkpoint.checkpoints import SMALL, hashes, load_tensors, save_llama
from ..modeling.models import STORIES, move_convs
from .processes import dynconv

COMMANDS = ("retrofit", "inspect", "generate", "doctor")


def succeeded(*arguments, **kwargs):
    run = dynconv(*arguments, **kwargs)
    assert run.returncode == 0, run.stderr
    if "--json" not in arguments:
        assert all(len(line) <= 80 for line in run.stdout.splitlines())
    return run.stdout


def failed(message, *arguments, **kwargs):
    run = dynconv(*arguments, **kwargs)
    assert run.returncode == 1, run.stdout + run.stderr
    assert re.fullmatch(f"Error: .*{message}.*\n", run.stderr), run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=str)
def test_help_fits_the_terminal(command):
    for option in ("--help", "-h"):
        text = succeeded(*command, option)
        assert "Usage:" in text and "…" not in text


def test_help_does_not_wait_for_torch():
    code = "import sys, dynconv_cli; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [("retrofit",), ("retrofit", "a"), ("inspect",), ("dance",), ("doctor", "--fast"), ("retrofit", "--rank", "x")],
    ids=" ".join,
)
def test_usage_errors(arguments):
    run = dynconv(*arguments)
    assert run.returncode == 2
    assert "Usage:" in run.stderr and "Traceback" not in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--mode", "fast", "'fast' is not one of 'lowrank', 'headwise', 'static'"),
        ("--init", "zeros", "'zeros' is not one of 'identity', 'uniform'"),
        ("--kernel-size", 9, "--kernel-size"),
        ("--rank", 0, "--rank"),
        ("--head-size", 0, "--head-size"),
        ("--targets", "q_proj,w_proj", "'w_proj' is not one of q_proj, k_proj"),
        ("--layers", "1-", "must be indices and ranges, as in 0,2,8-15, got '1-'"),
    ],
    ids=str,
)
def test_values_that_no_checkpoint_can_take_are_usage_errors(option, value, message, tmp_path):
    run = dynconv("retrofit", STORIES, tmp_path / "new", option, value)
    assert run.returncode == 2 and run.stdout == ""
    assert f"Invalid value for '{option}'" in run.stderr
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", run.stderr).split())
    assert not (tmp_path / "new").exists()


def test_a_plot_that_is_no_png_is_a_usage_error():
    run = dynconv("inspect", STORIES, "--plot", "plot.pdf")
    assert run.returncode == 2 and "must end" in run.stderr and run.stdout == ""


def test_the_choices_are_those_of_the_config():
    """Written anew in the command, which does not import the library for them."""
    # The package has the Typer object of the same name.
    app = importlib.import_module("dynconv_cli.app")
    assert app.TARGETS == CONV_TARGETS
    parameters = inspect.signature(app.retrofit).parameters
    assert get_args(get_args(parameters["mode"].annotation)[0]) == CONV_MODES


def test_as_a_module():
    run = subprocess.run([sys.executable, "-m", "dynconv_cli", "inspect", "/nowhere"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "Error: no such directory: /nowhere\n")


def test_from_a_base_to_text(tmp_path):
    text = succeeded("retrofit", STORIES, "made", "--targets", "all-linear", "--layers", "0,2-4", cwd=tmp_path)
    assert text.startswith("Made ") and "new in convolutions" in text.replace("\n", " ")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["conv_layers"] == [0, 2, 3, 4] and len(config["conv_targets"]) == 7

    text = succeeded("inspect", "made", "--plot", "plot.png", cwd=tmp_path)
    assert "DynConvLlamaForCausalLM" in text and "down_conv" in text and "0.0000" in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    # The layer is the identity: what the base says.
    text = succeeded("generate", "made", "Once upon a time", "--max-new-tokens", 12, cwd=tmp_path)
    assert text.startswith("Once upon a time, there was a")


def test_retrofit_with_every_option(tmp_path):
    base = save_llama(tmp_path / "base", dtype=torch.bfloat16)
    options = ["--targets", "q_proj, up_proj", "--mode", "headwise", "--kernel-size", 3, "--head-size", 8, "--rank", 2]
    options += ["--no-static", "--no-residual", "--init", "uniform", "--seed", 5, "--copy", "--overwrite", "--json"]
    result = json.loads(succeeded("retrofit", base, tmp_path / "made", *options))
    torch.manual_seed(5)
    conv = {"conv_targets": ["q_proj", "up_proj"], "conv_mode": "headwise", "conv_kernel_size": 3, "conv_rank": 2}
    conv |= {"conv_head_size": 8, "conv_static": False, "conv_residual": False, "conv_init": "uniform"}
    retrofit(base, **conv).save_pretrained(tmp_path / "expected")
    assert (tmp_path / "made" / "config.json").read_text() == (tmp_path / "expected" / "config.json").read_text()
    tensors = load_tensors(tmp_path / "expected")
    convs = [tensor for name, tensor in tensors.items() if "_conv." in name]
    assert result.pop("seconds") > 0
    assert result == {
        "destination": str(tmp_path / "made"),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "conv_parameters": sum(tensor.numel() for tensor in convs),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "conv_bytes": sum(tensor.nbytes for tensor in convs),
    }


def test_errors_of_retrofit(tmp_path):
    Qwen2ForCausalLM(Qwen2Config(**SMALL)).save_pretrained(tmp_path / "qwen2")
    save_llama(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    retrofit_checkpoint(STORIES, tmp_path / "made")
    before = hashes(tmp_path)
    for message, *arguments in [
        ("no such directory: ./nowhere", "./nowhere", "new"),
        ("Check your internet connection", "nobody/nothing", "new"),
        ("supports Llama .* './qwen2' has model_type 'qwen2'", "./qwen2", "new"),
        ("already has dynamic short convolutions", "made", "new"),
        ("destination exists; --overwrite replaces it: .*/made", STORIES, "made"),
        ("converts pickled weights: python -c", "pickled", "new"),
        ("conv_layers .*99", STORIES, "new", "--layers", "99"),
    ]:
        failed(message, "retrofit", *arguments, cwd=tmp_path)
    assert hashes(tmp_path) == before


def test_no_network(tmp_path):
    """The Hub is sought, and nobody answers."""
    # huggingface_hub tries six times, half a minute in all.
    impatient = "import time; time.sleep = lambda seconds: None; import dynconv_cli; dynconv_cli.main()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    # A port that nothing may listen on.
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", impatient, "retrofit", "nobody/nothing", str(tmp_path / "new")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch("Error: We couldn't connect to 'http://127.0.0.1:1'.*\n", run.stderr), run.stderr
    assert not (tmp_path / "new").exists()


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        run = dynconv("retrofit", STORIES, disk / "made")
        assert run.returncode == 1
        # After the progress of copying.
        assert re.fullmatch("Error: .*No space left on device.*", run.stderr.splitlines()[-1])
        assert "Traceback" not in run.stderr and os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A checkpoint whose convolutions are a known way from the identity."""
    directory = tmp_path_factory.mktemp("moved")
    made = retrofit_checkpoint(save_llama(directory / "base"), directory / "moved", conv_rank=2)
    file = max(made.glob("*.safetensors"))
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_tensors(made).items() if "_conv." in name}
    attention = "model.layers.1.self_attn"
    tensors[f"{attention}.q_conv.static_filter"][2] = 3
    tensors[f"{attention}.q_conv.basis"][0, 1] = 2
    tensors[f"{attention}.q_conv.filter_proj.weight"][0, :4] = 1
    save_file(tensors, file, metadata={"format": "pt"})
    return made


def test_inspect(moved):
    report = json.loads(succeeded("inspect", moved, "--json"))
    distances = {(row.pop("layer"), row.pop("conv")): row for row in report["distances"]}
    assert len(distances) == 9
    # 3 on one tap; 2 on another, times a coefficient that sums four entries of variance 1.
    assert distances[1, "q_conv"] == pytest.approx({"static": 3, "dynamic": 4, "total": 5})
    assert all(row["total"] == 0 for owner, row in distances.items() if owner != (1, "q_conv"))
    tensors = load_tensors(moved)
    assert sum(part["parameters"] for part in report["parts"]) == sum(tensor.numel() for tensor in tensors.values())
    assert sum(part["bytes"] for part in report["parts"]) == sum(tensor.nbytes for tensor in tensors.values())
    assert "other" not in [part["part"] for part in report["parts"]]
    assert "5.0000" in succeeded("inspect", moved)


def test_errors_of_inspect(moved, tmp_path):
    (tmp_path / "notes.png").write_text("mine")
    (tmp_path / "empty").mkdir()
    for message, *arguments in [
        ("no such directory: /nowhere", "/nowhere"),
        ("no config.json in this directory: empty", "empty"),
        ("a file, not the directory of a checkpoint: notes.png", "notes.png"),
        ("has no dynamic short convolutions .*model_type 'llama'.*`dynconv retrofit`", STORIES),
        ("no such directory: missing", moved, "--plot", "missing/plot.png"),
        ("would overwrite a file that is not a picture: notes.png", moved, "--plot", "notes.png"),
    ]:
        failed(message, "inspect", *arguments, cwd=tmp_path)
    assert (tmp_path / "notes.png").read_text() == "mine"


def test_generate():
    arguments = ("generate", STORIES, "Once upon a time", "--max-new-tokens", 8)
    result = json.loads(succeeded(*arguments, "--json"))
    assert result["new_tokens"] == 8
    assert result["text"] == succeeded(*arguments).rstrip("\n")
    sampled = (*arguments, "--temperature", 1.5, "--top-p", 0.9)
    assert succeeded(*sampled, "--seed", 1) == succeeded(*sampled, "--seed", 1) != succeeded(*arguments)


def test_generate_from_adapters(tmp_path):
    """LoRA or convolutions alone, on the base that the adapter names; with a tokenizer beside it or without."""
    model = move_convs(freeze_base(retrofit(STORIES)))
    save_conv_adapter(model, tmp_path / "convs")
    model.save_pretrained(tmp_path / "model")
    # Which changes the model.
    get_peft_model(model, lora_config(model)).save_pretrained(tmp_path / "lora")
    for name in ("lora", "model"):
        AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path / name)
    arguments = ("Lily went to the park with her mom", "--max-new-tokens", 20, "--json")
    texts = [succeeded("generate", tmp_path / name, *arguments) for name in ("model", "convs", "lora")]
    assert len(set(texts)) == 1
    assert texts[0] != succeeded("generate", STORIES, *arguments)


def test_generate_with_a_tokenizer_from_elsewhere(tmp_path):
    """What model.save_pretrained() leaves, alone; and adapters whose base has no tokenizer either."""
    base, weights = tmp_path / "base", tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(STORIES).save_pretrained(base)
    model = freeze_base(retrofit(base))
    model.save_pretrained(weights)
    save_conv_adapter(model, tmp_path / "convs")
    arguments = ("Once upon a time", "--max-new-tokens", 8)
    for folder, without in ((weights, weights), (tmp_path / "convs", base)):
        failed(f"'{without}' has no tokenizer: .*--tokenizer", "generate", folder, *arguments)
        text = succeeded("generate", folder, *arguments, "--tokenizer", STORIES)
        assert text == succeeded("generate", STORIES, *arguments)
    failed(f"'{weights}' has no tokenizer", "generate", STORIES, *arguments, "--tokenizer", weights)
    failed("no such directory: /nowhere", "generate", STORIES, *arguments, "--tokenizer", "/nowhere")


def test_inspect_says_what_to_do_with_an_adapter(tmp_path):
    model = freeze_base(retrofit(STORIES))
    save_conv_adapter(model, tmp_path / "convs")
    get_peft_model(model, lora_config(model)).save_pretrained(tmp_path / "lora")
    failed(r"'lora' is an adapter.*load_lora\('lora'\)\.merge_and_unload\(\)", "inspect", "lora", cwd=tmp_path)
    failed(r"'convs' is an adapter.*load_conv_adapter\('convs'\)\.save", "inspect", "convs", cwd=tmp_path)


def test_errors_of_generate(moved):
    failed("no such directory: /nowhere", "generate", "/nowhere", "Once")
    failed("Check your internet connection", "generate", "nobody/nothing", "Once")
    failed("--device abacus cannot be used", "generate", STORIES, "Once", "--device", "abacus")
    failed("tokenizer", "generate", moved, "Once")


def test_doctor():
    text = succeeded("doctor")
    assert "All is well" in text and "transformers" in text
    findings = json.loads(succeeded("doctor", "--json"))
    assert findings["healthy"] and all(row["ok"] for row in findings["self_test"])
    assert {row["operation"] for row in findings["self_test"]} == {"lowrank", "headwise", "static"}
    assert {row["device"] for row in findings["kernels"]} >= {"cpu"}


def test_doctor_finds_what_is_wrong(capsys, monkeypatch):
    from dynconv_cli import doctor, tables

    wrong = (doctor.kernels.static_conv1d, lambda x, static_filter, state: x * 0)
    broken = (lambda **_: 1 / 0, None)
    monkeypatch.setattr(doctor, "OPERATIONS", {**doctor.OPERATIONS, "static": wrong, "headwise": broken})
    findings = doctor.examine()
    assert not findings["healthy"]
    assert {row["operation"] for row in findings["self_test"] if row["ok"]} == {"lowrank"}
    tables.show_findings(findings)
    output = capsys.readouterr().out
    assert "FAILED" in output and "ZeroDivisionError" in output and "Something is wrong" in output


def test_doctor_ends_with_an_error_code():
    # An implementation that this machine has not.
    assert dynconv("doctor", "--json", DYNCONV_IMPL="abacus").returncode == 1
