"""What an installation promises: light imports, pins that fit, an example that runs."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("triton", "peft", "datasets", "matplotlib", "rich", "accelerate")
WHAT_THE_MODELS_ARE_MADE_OF = "import torch, transformers, transformers.models.llama.modeling_llama"


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_adds_no_optional_package():
    """Compared with what transformers itself brings in: that is not ours to say."""
    output = run_python(
        f"import sys\n{WHAT_THE_MODELS_ARE_MADE_OF}\n"
        "from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering\n"
        "before = set(sys.modules)\nimport dynconv_hf\n"
        f"print([name for name in {OPTIONAL} if name in set(sys.modules) - before])"
    )
    assert output.strip() == "[]"


def test_works_without_the_optional_packages():
    """None in sys.modules is how Python marks a module that cannot be imported; accelerate is a requirement."""
    absent = tuple(name for name in OPTIONAL if name != "accelerate")
    output = run_python(
        f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
        "import torch, dynconv_hf, dynconv_hf.training\n"
        "config = dynconv_hf.DynConvLlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, "
        "num_hidden_layers=1, num_attention_heads=1, eos_token_id=None)\n"
        "model = dynconv_hf.DynConvLlamaForCausalLM(config)\n"
        "model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()\n"
        "print(model.generate(torch.arange(3)[None], max_new_tokens=2, do_sample=False).shape)"
    )
    assert output.strip() == "torch.Size([1, 5])"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_every_requirement(python):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({**LINUX, "python_full_version": f"{python}.1"}):
            assert pin.name not in pins, f"{pin.name} is pinned twice for Python {python}"
            pins[pin.name] = [specifier.version for specifier in pin.specifier]
    for requirement in requirements():
        if requirement.marker is not None and not requirement.marker.evaluate({**LINUX, "python_version": python}):
            continue
        assert requirement.name in pins, f"{requirement.name} has no pin for Python {python}"
        assert all(requirement.specifier.contains(version) for version in pins[requirement.name]), requirement


LINUX = {"sys_platform": "linux", "platform_machine": "x86_64"}


def requirements() -> list[Requirement]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = "\n".join([config["options"]["install_requires"], extras["demo"], extras["test"]])
    return [Requirement(line) for line in lines.splitlines() if line]


def test_readme_example(tmp_path, monkeypatch):
    """As a reader runs it from a clone, but with what it saves landing elsewhere."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
