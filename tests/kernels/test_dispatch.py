"""Which implementation runs: seen, forced, refused."""

import os
import subprocess
import sys

import pytest
import torch

from dynconv_hf.kernels import (
    describe_group_implementation,
    describe_implementation,
    dispatch,
    lowrank_dynamic_conv1d,
    static_conv1d,
)

ON_GPU = torch.cuda.is_available()


def test_auto_by_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNCONV_IMPL", raising=False)
    x, z = torch.randn(1, 5, 8, device=device), torch.randn(1, 5, 3, device=device)
    u = torch.randn(3, 4, 8, device=device)
    choice = describe_implementation(x, z, u)
    assert choice.name.startswith("triton: " if ON_GPU else "reference")
    assert device.type in choice.reason.lower()


def test_forced(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 5, 8, device=device)
    assert describe_implementation(x, impl="reference").name == "reference"
    assert describe_implementation(x, impl="triton").name == "triton: direct"
    monkeypatch.setenv("DYNCONV_IMPL", "triton")
    assert describe_implementation(x).name == "triton: direct"
    assert describe_implementation(x, impl="reference").name == "reference"
    monkeypatch.setenv("DYNCONV_IMPL", "reference")
    assert describe_implementation(x) == ("reference", "the environment variable DYNCONV_IMPL asks for it")


def test_float64_is_the_references(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNCONV_IMPL", raising=False)
    x = torch.randn(1, 5, 8, device=device, dtype=torch.float64)
    assert describe_implementation(x).name == "reference"
    with pytest.raises(ValueError, match="float64"):
        static_conv1d(x, torch.randn(4, 8, device=device), impl="triton")


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        static_conv1d(torch.randn(1, 5, 8), torch.randn(4, 8), impl="triton")


@pytest.mark.parametrize("name", ["cuda", "", "Triton"])
def test_unknown_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"got {name!r}"):
        describe_implementation(torch.randn(1, 5, 8), impl=name)
    monkeypatch.setenv("DYNCONV_IMPL", name)
    with pytest.raises(ValueError, match=f"DYNCONV_IMPL.*got {name!r}"):
        describe_implementation(torch.randn(1, 5, 8))


def in_new_process(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DYNCONV_IMPL")}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_import_does_not_import_the_kernels() -> None:
    """transformers may import Triton; we do so only when a kernel runs."""
    code = "import sys, dynconv_hf.kernels as k; print([m for m in sys.modules if m.startswith(k.__name__)])"
    modules = in_new_process(code)
    assert "dynconv_hf.kernels.ops" in modules
    assert "dynconv_hf.kernels.launch" not in modules and "lowrank" not in modules


def test_without_triton() -> None:
    code = """
import importlib.util, sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name, name=name)
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
sys.meta_path.insert(0, NoTriton())
import torch, dynconv_hf.kernels as kernels
x, s = torch.randn(1, 5, 8), torch.randn(4, 8)
kernels.static_conv1d(x, s)
print(kernels.describe_implementation(x).reason)
try:
    kernels.static_conv1d(x, s, impl="triton")
except ValueError as error:
    print(error)
"""
    assert in_new_process(code).count("Triton is not installed") == 2


@pytest.mark.parametrize(("found", "fits"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True), ("4.0", True)])
def test_an_old_triton_is_left_alone(found: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "version", lambda name: found)
    reason = dispatch._missing_triton()
    assert (reason is None) == fits
    if not fits:
        monkeypatch.setattr(dispatch, "_MISSING_TRITON", reason)
        with pytest.raises(ValueError, match=r"Triton is 3\.5\.1, and the kernels need 3\.6 or newer"):
            static_conv1d(torch.zeros(1, 2, 3), torch.zeros(4, 3), impl="triton")


@pytest.mark.skipif(ON_GPU, reason="launches are seen in Triton's interpreter")
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("kernel_size", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_kernels_told_are_those_launched(
    dtype: torch.dtype, kernel_size: int, state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward; what all kernels share, such as adding partial sums, has modules of its own."""
    from triton.runtime.interpreter import InterpretedFunction

    launched, launch = [], InterpretedFunction.run

    def run(self, *args, **kwargs):
        launched.append(self.fn.__module__.rpartition(".")[2])
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    x = torch.randn(1, 5, 16, dtype=dtype, requires_grad=True)
    z, u = torch.randn(1, 5, 3, dtype=dtype), torch.randn(3, kernel_size, 16, dtype=dtype)
    arguments = {"initial_state": torch.randn(1, kernel_size - 1, 16, dtype=dtype) if state else None}
    lowrank_dynamic_conv1d(x, z, u, **arguments, impl="triton").sum().backward()
    modules = [module for module in dict.fromkeys(launched) if module.startswith("lowrank")]
    assert describe_implementation(x, z, u, **arguments, impl="triton").name == f"triton: {' / '.join(modules)}"
    group = describe_group_implementation([x, x], torch.stack([z, z], 2), [u, u], impl="triton").name
    alone = describe_implementation(x, z, u, impl="triton").name.removeprefix("triton: ")
    assert group == f"triton: lowrank_one_by_one: {alone}, {alone}"
