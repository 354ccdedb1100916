"""What `dynconv doctor` finds out.

Shape suffixes: B batch, T tokens, D channels, W kernel size, R rank, H filter heads.
"""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import dynconv_hf
from dynconv_hf import kernels

__all__ = ["examine"]

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "accelerate",
    "peft",
    "bitsandbytes",
    "trl",
)
OPERATIONS = {
    "lowrank": (kernels.lowrank_dynamic_conv1d, kernels.lowrank_dynamic_conv1d_update),
    "headwise": (kernels.headwise_dynamic_conv1d, kernels.headwise_dynamic_conv1d_update),
    "static": (kernels.static_conv1d, kernels.static_conv1d_update),
}
# Relative to the largest value of the result: rounding of the output and, for gradients, of what is summed.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# As wide as the fastest kernels want it: those of models are what is to be told of.
BATCH, TOKENS, CHANNELS, KERNEL_SIZE, RANK, HEADS = 2, 37, 128, 4, 15, 4


def examine() -> dict[str, Any]:
    """Versions, kernels and the self-test, as a dictionary that JSON can hold."""
    places = [(device, dtype) for device in _devices() for dtype in TOLERANCES]
    results = [_test(mode, device, dtype) for device, dtype in places for mode in OPERATIONS]
    return {
        "versions": {
            "python": platform.python_version(),
            "dynconv-hf": dynconv_hf.__version__,
            **{package: _version(package) for package in PACKAGES},
        },
        "kernels": [_kernels(device, dtype) for device, dtype in places],
        "self_test": results,
        "healthy": all(result["ok"] for result in results),
    }


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which implementation of the low-rank operation runs, and why."""
    name, reason = _describe_implementation(device, dtype)
    return {"device": _device_name(device), "dtype": _dtype_name(dtype), "implementation": name, "reason": reason}


def _describe_implementation(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if not hasattr(kernels, "describe_implementation"):
        return "reference", "this version has no other"
    inputs = _inputs("lowrank", device, dtype)
    try:
        return tuple(kernels.describe_implementation(inputs["x"], inputs["coefficients"], inputs["basis"]))
    except ValueError as error:
        return "none", str(error)


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _test(mode: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    row = {"device": str(device), "dtype": _dtype_name(dtype), "operation": mode, "error": None, "problem": None}
    try:
        row["error"] = _largest_error(mode, device, dtype)
    # Whatever a compiler or a driver raises is a finding, and the other tests still run.
    except Exception as error:
        row["problem"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return {**row, "ok": False}
    if not row["error"] <= TOLERANCES[dtype]:
        row["problem"] = f"more than {TOLERANCES[dtype]:.0e}"
    return {**row, "ok": row["problem"] is None}


def _largest_error(mode: str, device: torch.device, dtype: torch.dtype) -> float:
    """Of the output, its gradients and a step of one token, relative to the largest value of each."""
    operation, update = OPERATIONS[mode]
    inputs = _inputs(mode, device, dtype)
    exact = {name: _exact(tensor) for name, tensor in inputs.items()}
    y, expected = operation(**inputs), _formula(**exact)
    pairs = [(y, expected)]
    differentiable = [name for name in inputs if name != "positions"]
    gradient = _random(expected.shape, 7, device, dtype)
    pairs += zip(
        torch.autograd.grad(y, [inputs[name] for name in differentiable], gradient),
        torch.autograd.grad(expected, [exact[name] for name in differentiable], _exact(gradient)),
        strict=True,
    )
    pairs.append((_one_step(mode, update, inputs), _formula(**{**exact, "positions": None})[:, 0]))
    return max(_error(actual, wanted) for actual, wanted in pairs)


@torch.no_grad()
def _one_step(mode: str, update: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    per_token = {"x", "coefficients", "filters"}
    arguments = {name: tensor[:, 0] if name in per_token else tensor for name, tensor in inputs.items()}
    arguments["state"] = arguments.pop("initial_state").clone()
    del arguments["positions"]
    return update(**arguments)


def _error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((_exact(actual) - wanted).abs().max() / wanted.abs().max()).item()


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.detach().cpu()
    return copy.double().requires_grad_() if copy.is_floating_point() else copy


def _inputs(mode: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {
        "x": (BATCH, TOKENS, CHANNELS),
        "static_filter": (KERNEL_SIZE, CHANNELS),
        "initial_state": (BATCH, KERNEL_SIZE - 1, CHANNELS),
    }
    if mode == "lowrank":
        shapes |= {"coefficients": (BATCH, TOKENS, RANK), "basis": (RANK, KERNEL_SIZE, CHANNELS)}
    elif mode == "headwise":
        shapes |= {"filters": (BATCH, TOKENS, HEADS, KERNEL_SIZE)}
    inputs = {name: _random(shape, seed, device, dtype) for seed, (name, shape) in enumerate(shapes.items())}
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    # Documents of 11 tokens; the first goes on from the state.
    positions = (torch.arange(TOKENS) + KERNEL_SIZE) % 11
    return {**inputs, "positions": positions.expand(BATCH, -1).to(device)}


def _random(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _formula(
    x: torch.Tensor,
    static_filter: torch.Tensor,
    initial_state: torch.Tensor,
    positions: torch.Tensor | None,
    coefficients: torch.Tensor | None = None,
    basis: torch.Tensor | None = None,
    filters: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[t] = x[t] + sum over w of k[t, w] * x[t - w], where t - w lies in the same document."""
    k_BTWD = static_filter.expand(*x.shape[:2], -1, -1)
    if basis is not None:
        k_BTWD = k_BTWD + torch.einsum("btr,rwd->btwd", coefficients, basis)
    if filters is not None:
        k_BTWD = k_BTWD + filters.transpose(2, 3).repeat_interleave(CHANNELS // HEADS, dim=3)
    padded = torch.cat([initial_state, x], dim=1)
    y = x
    for w in range(KERNEL_SIZE):
        start = KERNEL_SIZE - 1 - w
        term = k_BTWD[:, :, w] * padded[:, start : start + x.shape[1]]
        y = y + (term if positions is None else term * (positions >= w).unsqueeze(-1))
    return y
