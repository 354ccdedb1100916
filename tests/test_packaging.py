"""What an installation promises: light imports, pins that fit, an example that runs."""

import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
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


def test_every_requirement_has_a_lower_bound():
    """An old release that an environment has already satisfies pip otherwise, and fails when it is used."""
    for requirement in requirements():
        bounds = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
        assert len(bounds) == 1, f"setup.cfg does not say from which version on {requirement.name} works"


@pytest.mark.parametrize(
    ("name", "works", "fails"),
    [("torch", "2.9.0", "2.8.0"), ("accelerate", "1.1.0", "1.0.1"), ("peft", "0.19.1", "0.19.0")],
)
def test_versions_that_fail_are_not_promised(name, works, fails):
    (requirement,) = (requirement for requirement in requirements() if requirement.name == name)
    assert requirement.specifier.contains(works) and not requirement.specifier.contains(fails)


def test_triton_allows_what_the_oldest_torch_pins():
    """PyTorch 2.9 requires triton 3.5, with which the kernels leave the work to the formula."""
    (requirement,) = (requirement for requirement in requirements() if requirement.name == "triton")
    assert requirement.specifier.contains("3.5.0")


def test_readme_names_the_bounds():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Versions")[2].partition("## ")[0]
    bounds = {
        requirement.name: str(next((s for s in requirement.specifier if s.operator == ">="), ""))
        for requirement in requirements()
    }
    names = {"torch": "PyTorch", "accelerate": "accelerate", "peft": "PEFT", "typer": "Typer"}
    for package, name in names.items():
        assert f"{name} {bounds[package].removeprefix('>=')}" in text


def test_distributions_hold_the_package_alone(tmp_path):
    """The source distribution has no lone test files, of which setuptools takes some by itself; the wheel is typed.

    What a package index shows has no pictures and links that it would look for beside itself.
    """
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "dynconv_cli", "dynconv_hf", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta\nbuild_meta.build_sdist('dist')\nbuild_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    (sdist,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames() if "egg-info" not in name}
    assert "README.md" in files
    assert {name for name in files if name.startswith("docs/")} == {"docs/package_index.md"}
    assert {name.split("/")[0] for name in files if "/" in name} == {"docs", "dynconv_cli", "dynconv_hf"}
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert "retrofit" in metadata
    assert [link for link in re.findall(r"\]\((.*?)\)", metadata) if not link.startswith("https://")] == []
    assert "dynconv_hf/py.typed" in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"dynconv_cli", "dynconv_hf"}


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
