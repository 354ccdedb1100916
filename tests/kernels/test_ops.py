"""The operators under PyTorch's own checks: opcheck, torch.compile, checkpointing, autocast, CUDA graphs."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dynconv_hf.kernels import lowrank_dynamic_conv1d, ops

from .cases import Case, operation, run

MODES = ["lowrank", "headwise", "static"]


def operator_arguments(case: Case) -> tuple[Any, ...]:
    inputs = case.inputs()
    state, static = inputs.pop("initial_state", None), inputs.pop("static_filter", None)
    return (*inputs.values(), static, case.residual, case.token_positions(), state)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "all arguments"])
def test_opcheck(mode: str, full: bool, device: torch.device) -> None:
    case = Case(mode, tokens=9, channels=20, static=full, device=device)
    if full:
        case = Case(mode, tokens=9, channels=20, positions="packed", state=True, layout="slice", device=device)
    torch.library.opcheck(getattr(ops, mode), operator_arguments(case))


@pytest.mark.parametrize("mode", MODES)
def test_compile_has_no_graph_break_and_no_recompilation(mode: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def loss(inputs: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        y, state = operation(mode)(**inputs, positions=positions, return_final_state=True, impl="triton")
        return y.square().sum() + state.sum()

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for i, (batch, tokens) in enumerate([(2, 9), (3, 17), (4, 33)]):
        case = Case(mode, batch, tokens, channels=20, positions="packed", device=device)
        inputs, same = case.inputs(), case.inputs()
        # The first shape compiles; the others must find what is there.
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            compiled(inputs, case.token_positions()).backward()
        loss(same, case.token_positions()).backward()
        for name in inputs:
            torch.testing.assert_close(inputs[name].grad, same[name].grad, msg=name)


def test_auto_compiles(device: torch.device) -> None:
    torch._dynamo.reset()
    inputs = Case("lowrank", tokens=9, channels=20, device=device).inputs()
    y = torch.compile(lambda a: lowrank_dynamic_conv1d(**a), fullgraph=True, backend="aot_eager")(inputs)
    torch.testing.assert_close(y, lowrank_dynamic_conv1d(**inputs))


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing(mode: str, device: torch.device) -> None:
    case = Case(mode, tokens=9, channels=20, device=device)
    inputs, dy = case.inputs(), case.output_gradient()
    names = list(inputs)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return operation(mode)(**dict(zip(names, tensors, strict=True)), impl="triton")

    checkpoint(call, *inputs.values(), use_reentrant=False).backward(dy)
    want = run(case, case.inputs(), dy, "triton")
    # The final state, which `run` adds to what is differentiated, reaches x alone.
    for name in set(names) - {"x"}:
        assert torch.equal(inputs[name].grad, want[f"d{name}"]), name


def test_autocast_leaves_the_types_alone(device: torch.device) -> None:
    """Half-precision activations meet float32 parameters: y and every gradient keep their input's type."""
    case = Case("lowrank", tokens=9, channels=20, dtype=torch.bfloat16, device=device)
    inputs = case.inputs()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = lowrank_dynamic_conv1d(**inputs, impl="triton")
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    for name, tensor in inputs.items():
        assert tensor.grad.dtype == tensor.dtype, name


def test_only_wanted_gradients(device: torch.device) -> None:
    inputs = Case("lowrank", tokens=9, channels=20, device=device).inputs()
    inputs["basis"].requires_grad_(False)
    lowrank_dynamic_conv1d(**inputs, impl="triton").sum().backward()
    assert inputs["basis"].grad is None and inputs["x"].grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph(mode: str, device: torch.device) -> None:
    case = Case(mode, tokens=300, channels=256, heads=16, dtype=torch.bfloat16, device=device)
    inputs, dy = case.inputs(), case.output_gradient()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(case, inputs, dy, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(case, inputs, dy, "triton")
    with torch.no_grad():
        inputs["x"].mul_(2.0)
    graph.replay()
    want = run(case, inputs, dy, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)
