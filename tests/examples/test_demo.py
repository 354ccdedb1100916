"""The demo, on less text and for fewer steps."""

import json
import sys

import demo
import pytest


@pytest.fixture
def less_text(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text(demo.TEXT.read_text()[:40_000])
    monkeypatch.setattr(demo, "TEXT", path)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
    demo.main()


def test_demo(less_text, tmp_path, monkeypatch, capsys):
    earlier = tmp_path / "runs" / "demo-1"
    earlier.mkdir(parents=True)
    (earlier / "table.md").write_text("earlier results")
    run(monkeypatch, "--steps", 2, "--output_dir", tmp_path / "runs")

    printed = capsys.readouterr().out
    assert "eager attention" in printed
    assert "held-out loss after" in printed
    assert printed.count(demo.PROMPT.strip()) == 2
    assert (earlier / "table.md").read_text() == "earlier results"
    directory = tmp_path / "runs" / "demo-2"
    assert "| parameters" in (directory / "table.md").read_text()
    assert (directory / "loss_curves.png").is_file()

    plain, convolved = json.loads((directory / "results.json").read_text())["results"].values()
    # The retrofitted model starts as its base, also as the Trainer measures it.
    assert plain["loss_before"] == convolved["loss_before"]
    assert plain["loss_after"] != convolved["loss_after"]
    assert plain["parameters"] < convolved["parameters"]


def test_both_models_see_the_same_rows(less_text, tmp_path, monkeypatch):
    rows = {}

    def record(model, arguments, kwargs):
        rows.setdefault(type(model).__name__, []).append(kwargs["input_ids"].tolist())

    def load_model(arguments):
        model = original(arguments)
        model.register_forward_pre_hook(record, with_kwargs=True)
        return model

    original = demo.load_model
    monkeypatch.setattr(demo, "load_model", load_model)
    run(monkeypatch, "--steps", 2, "--output_dir", tmp_path / "runs")
    assert rows["LlamaForCausalLM"] == rows["DynConvLlamaForCausalLM"]


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_no_steps(monkeypatch, capsys, steps):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--steps", steps)
    assert f"must be at least 1, got {steps}" in capsys.readouterr().err
