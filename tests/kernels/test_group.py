"""The operation on a group of tensors: against the reference, under PyTorch's own checks, refused where wrong."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dynconv_hf.kernels import (
    Rotary,
    describe_group_implementation,
    lowrank_dynamic_conv1d,
    lowrank_dynamic_conv1d_group,
    ops,
)
from dynconv_hf.kernels.rotary import rotate, rotate_back

from .cases import TOLERANCE
from .group_cases import LISTS, GroupCase, flat, group_errors, run_group

FULL = GroupCase(positions="packed", state=True)
CASES = {
    "plain": GroupCase(static=False, rotary_dim=0),
    "as trained": GroupCase(rotary_rows=1),
    "all arguments": FULL,
    "padded, partial rotary": GroupCase(positions="padded", rotary_dim=4, residual=False),
    "slices, other sizes": GroupCase(layout="slice", kernel_size=3, rank=5, tokens=2, state=True),
    "one": GroupCase(channels=(24,), rotated=(True,)),
    "two without rotation": GroupCase(channels=(24, 40), rotary_dim=0),
    "many tokens": GroupCase(batch=1, tokens=150, positions="packed", rotated=(False, True, True)),
    "no tokens": GroupCase(tokens=0),
}


def random_rotary(batch: int, tokens: int, rotary_dim: int, head_dim: int, dtype: torch.dtype) -> Rotary:
    cos, sin = (torch.randn(batch, tokens, rotary_dim, dtype=dtype) for _ in range(2))
    return Rotary(cos, sin, head_dim, (True,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotary_batch", [1, 2])
def test_rotation_is_that_of_transformers_to_the_last_bit(dtype: torch.dtype, rotary_batch: int) -> None:
    x = torch.randn(2, 9, 24, dtype=dtype, requires_grad=True)
    rotary = random_rotary(rotary_batch, 9, 8, 8, dtype)
    heads = x.unflatten(-1, (-1, 8)).transpose(1, 2)
    want, _ = apply_rotary_pos_emb(heads, heads, rotary.cos, rotary.sin)
    want = want.transpose(1, 2).flatten(2)
    assert torch.equal(rotate(x, rotary), want)
    dy = torch.randn_like(want)
    assert torch.equal(rotate_back(dy, rotary), torch.autograd.grad(want, x, dy)[0])


def test_partial_rotation_leaves_the_other_channels_alone() -> None:
    x, rotary = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True), random_rotary(2, 9, 4, 8, torch.double)
    y = rotate(x, rotary)
    heads, turned = x.unflatten(-1, (-1, 8)), y.unflatten(-1, (-1, 8))
    assert torch.equal(turned[..., 4:], heads[..., 4:])
    whole = rotate(heads[..., :4].flatten(2), rotary._replace(head_dim=4))
    assert torch.equal(turned[..., :4].flatten(2), whole)
    dy = torch.randn_like(y)
    torch.testing.assert_close(rotate_back(dy, rotary), torch.autograd.grad(y, x, dy)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, dtype: torch.dtype, device: torch.device) -> None:
    found = group_errors(dataclasses.replace(CASES[name], dtype=dtype, device=device))
    too_large = {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]}
    assert not too_large


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_operation_on_each_and_then_the_rotation(name: str, device: torch.device) -> None:
    arguments = dataclasses.replace(CASES[name], device=device).arguments()
    ys = lowrank_dynamic_conv1d_group(**arguments, impl="reference")
    rotary = arguments.get("rotary")
    for g, y in enumerate(ys):
        want = lowrank_dynamic_conv1d(
            arguments["xs"][g],
            arguments["coefficients"][:, :, g],
            arguments["bases"][g],
            static_filter=arguments["static_filters"][g] if "static_filters" in arguments else None,
            initial_state=arguments["initial_states"][g] if "initial_states" in arguments else None,
            residual=arguments["residual"],
            positions=arguments["positions"],
            impl="reference",
        )
        assert torch.equal(y, rotate(want, rotary) if rotary and rotary.rotated[g] else want)


def test_gradients_of_the_reference() -> None:
    case = GroupCase(1, 5, (8, 4), rank=2, head_dim=4, rotary_dim=2, rotated=(True, False), dtype=torch.double)
    arguments = dataclasses.replace(case, parameter_dtype=torch.double, positions="packed", state=True).arguments()
    leaves = flat(arguments)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(lowrank_dynamic_conv1d_group(**rebuilt(arguments, tensors)))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def rebuilt(arguments: dict[str, Any], tensors: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """The arguments with the leaves of `flat` replaced."""
    tensors = dict(zip(flat(arguments), tensors, strict=True))
    lists = {
        name: [tensors[f"{name}[{g}]"] for g in range(len(arguments[name]))] for name in LISTS if name in arguments
    }
    return {**arguments, **lists, "coefficients": tensors["coefficients"]}


@pytest.mark.parametrize("full", [False, True], ids=["plain", "all arguments"])
def test_opcheck(full: bool, device: torch.device) -> None:
    case = dataclasses.replace(FULL if full else CASES["plain"], tokens=9, device=device)
    arguments = case.arguments()
    cos, sin, head_dim, rotated = arguments.get("rotary") or (None, None, 0, (False,) * len(case.channels))
    torch.library.opcheck(
        ops.lowrank_group,
        (
            arguments["xs"],
            arguments["coefficients"],
            arguments["bases"],
            arguments.get("static_filters", []),
            case.residual,
            arguments["positions"],
            arguments.get("initial_states", []),
            cos,
            sin,
            head_dim,
            list(rotated),
        ),
    )


def test_compile_has_no_graph_break_and_no_recompilation(device: torch.device) -> None:
    torch._dynamo.reset()

    def loss(arguments: dict[str, Any]) -> torch.Tensor:
        return sum(y.square().sum() for y in lowrank_dynamic_conv1d_group(**arguments, impl="triton"))

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for i, (batch, tokens) in enumerate([(2, 9), (3, 17), (4, 33)]):
        case = GroupCase(batch, tokens, positions="packed", device=device)
        arguments, same = case.arguments(), case.arguments()
        # The first shape compiles; the others must find what is there.
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            compiled(arguments).backward()
        loss(same).backward()
        for name, tensor in flat(arguments).items():
            torch.testing.assert_close(tensor.grad, flat(same)[name].grad, msg=name)


def test_activation_checkpointing(device: torch.device) -> None:
    case = dataclasses.replace(FULL, tokens=9, device=device)
    arguments, dys = case.arguments(), case.output_gradients()
    leaves = flat(arguments)

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return lowrank_dynamic_conv1d_group(**rebuilt(arguments, tensors), impl="triton")

    torch.autograd.backward(checkpoint(call, *leaves.values(), use_reentrant=False), dys)
    want = run_group(case.arguments(), dys, "triton")
    for name, tensor in leaves.items():
        assert torch.equal(tensor.grad, want[f"d{name}"]), name


def test_autocast_leaves_the_types_alone(device: torch.device) -> None:
    arguments = dataclasses.replace(FULL, tokens=9, dtype=torch.bfloat16, device=device).arguments()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ys = lowrank_dynamic_conv1d_group(**arguments, impl="triton")
    sum(y.sum() for y in ys).backward()
    assert {y.dtype for y in ys} == {torch.bfloat16}
    for name, tensor in flat(arguments).items():
        assert tensor.grad.dtype == tensor.dtype, name


def test_only_wanted_gradients(device: torch.device) -> None:
    arguments = dataclasses.replace(FULL, tokens=9, device=device).arguments()
    for name in ("bases[1]", "static_filters[0]", "xs[2]", "coefficients"):
        flat(arguments)[name].requires_grad_(False)
    ys = lowrank_dynamic_conv1d_group(**arguments, impl="triton")
    ys[0].sum().backward()
    wanted = {name for name, tensor in flat(arguments).items() if tensor.grad is not None}
    assert {"xs[0]", "bases[0]", "initial_states[0]"} <= wanted
    assert not wanted & {"bases[1]", "static_filters[0]", "xs[2]", "coefficients"}


def test_no_gradients_for_cos_and_sin_and_none_at_all_without_grad(device: torch.device) -> None:
    arguments = dataclasses.replace(FULL, tokens=9, device=device).arguments()
    rotary = arguments["rotary"]
    arguments["rotary"] = rotary._replace(cos=rotary.cos.requires_grad_(), sin=rotary.sin.requires_grad_())
    for impl in ("triton", "reference"):
        sum(y.sum() for y in lowrank_dynamic_conv1d_group(**arguments, impl=impl)).backward()
        assert rotary.cos.grad is None and rotary.sin.grad is None
        with torch.no_grad():
            assert not lowrank_dynamic_conv1d_group(**arguments, impl=impl)[0].requires_grad


def test_the_choice_is_told(device: torch.device) -> None:
    arguments = GroupCase(device=device).arguments()
    del arguments["residual"]
    assert describe_group_implementation(**arguments, impl="reference").name == "reference"
    choice = describe_group_implementation(**arguments, impl="triton")
    assert choice.name == f"triton: lowrank_one_by_one: {', '.join(['lowrank'] * len(arguments['xs']))}"
    assert "not lowrank_gluon" in choice.reason
    with pytest.raises(ValueError, match="impl must be one of"):
        describe_group_implementation(**arguments, impl="cuda")


X, Z, U = torch.zeros(2, 5, 6), torch.zeros(2, 5, 2, 3), torch.zeros(3, 4, 6)
COS = torch.zeros(1, 5, 2)
BOTH = (True, False)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([], Z, []), {}, ValueError, "at least one tensor"),
        (([X, 1.0], Z, [U, U]), {}, TypeError, r"xs\[1\] must be a tensor, got float"),
        (([X, X[0]], Z, [U, U]), {}, ValueError, r"xs\[1\] must have shape \(B, T, D\), got \(5, 6\)"),
        (([X, X.double()], Z, [U, U]), {}, TypeError, "one dtype, got torch.float32 and torch.float64"),
        (([X, X[:, 1:]], Z, [U, U]), {}, ValueError, r"same B and T, got \(2, 5, 6\) and \(2, 4, 6\)"),
        (([X, X], Z, [U]), {}, ValueError, "bases must have as many tensors as xs, 2, got 1"),
        (([X, X], Z[:, :, :1], [U, U]), {}, ValueError, r"B, T, G = \(2, 5, 2\) as in xs, got \(2, 5, 1, 3\)"),
        (([X, X], Z[:, :, 0], [U, U]), {}, ValueError, r"\(B, T, G, R\).*got \(2, 5, 3\)"),
        (([X, X], Z.long(), [U, U]), {}, TypeError, "coefficients must be a floating tensor"),
        (([X, X], Z[..., :0], [U[:0], U[:0]]), {}, ValueError, "R must be at least 1"),
        (([X, X], Z, [U, U[:, :3]]), {}, ValueError, r"bases\[1\] .*the same W in all bases, got \(3, 3, 6\)"),
        (([X, X], Z, [U, U[..., :5]]), {}, ValueError, r"bases\[1\] .*D = 6 as in xs\[1\].*got \(3, 4, 5\)"),
        (([X, X], Z, [U[:2], U]), {}, ValueError, r"bases\[0\] .*R = 3.*got \(2, 4, 6\)"),
        (([X, X], Z, [U[0], U]), {}, ValueError, r"bases\[0\] .*got \(4, 6\)"),
        (([X, X], Z, [U.repeat(1, 3, 1)] * 2), {}, ValueError, "from 1 to 8, got 12"),
        (([X, X], Z, [U, U.to("meta")]), {}, ValueError, "on the device of x, cpu, got meta"),
        (([X, X], Z, [U, U]), {"static_filters": [U[0]]}, ValueError, "static_filters must have as many .*got 1"),
        (([X, X], Z, [U, U]), {"static_filters": [U[0], U[0, :2]]}, ValueError, r"\(4, 6\), got \(2, 6\)"),
        (([X, X], Z, [U, U]), {"initial_states": [X[:, :3], X]}, ValueError, r"\(2, 3, 6\), got \(2, 5, 6\)"),
        (([X, X], Z, [U, U]), {"positions": torch.zeros(2, 4, dtype=torch.long)}, ValueError, r"got \(2, 4\)"),
        (([X, X], Z, [U, U]), {"rotary": (COS, COS)}, TypeError, "must be a Rotary, got tuple"),
        (([X, X], Z, [U, U]), {"rotary": Rotary(COS, COS, 2, (True,))}, ValueError, r"2 tensors, got \(True,\)"),
        (([X, X], Z, [U, U]), {"rotary": Rotary(COS.double(), COS, 2, BOTH)}, TypeError, "cos must have the dtype"),
        (([X, X], Z, [U, U]), {"rotary": Rotary(COS, COS[:, :4], 2, BOTH)}, ValueError, r"sin .*got \(1, 4, 2\)"),
        (([X, X], Z, [U, U]), {"rotary": Rotary(COS, COS[..., :1], 2, BOTH)}, ValueError, "the same even number"),
        (([X, X], Z, [U, U]), {"rotary": Rotary(COS, COS, 1, BOTH)}, ValueError, "head_dim = 1"),
        (([X, X], Z, [U, U]), {"rotary": Rotary(COS, COS, 4, BOTH)}, ValueError, "divide the 6 channels .*got 4"),
        (([X, X], Z, [U, U]), {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
    ],
)
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        lowrank_dynamic_conv1d_group(*arguments, **options)


WIDE = GroupCase(3, 300, (256, 128, 128), dtype=torch.bfloat16, head_dim=64, rotary_dim=64)
WIDE_CASES = {
    "plain": WIDE,
    "packed": dataclasses.replace(WIDE, positions="packed", state=True, rotary_rows=1),
    "no static filter, no rotation": dataclasses.replace(WIDE, static=False, rotary_dim=0, rank=16),
    "one head size": dataclasses.replace(WIDE, head_dim=128, rotary_dim=128, parameter_dtype=torch.bfloat16),
    "two": dataclasses.replace(WIDE, channels=(512, 512), rotary_dim=0, rotated=(False, False), tokens=1024),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", WIDE_CASES)
def test_the_fastest_kernels(name: str, device: torch.device) -> None:
    case = dataclasses.replace(WIDE_CASES[name], device=device)
    arguments = case.arguments()
    del arguments["residual"]
    choice = describe_group_implementation(**arguments)
    assert choice.name == "triton: lowrank_gluon", choice.reason
    found = group_errors(case)
    assert max(found.values()) <= TOLERANCE[torch.bfloat16], found


@pytest.mark.gpu
def test_cuda_graph(device: torch.device) -> None:
    case = dataclasses.replace(WIDE, device=device)
    arguments, dys = case.arguments(), case.output_gradients()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run_group(arguments, dys, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run_group(arguments, dys, "triton")
    with torch.no_grad():
        arguments["xs"][0].mul_(2.0)
    graph.replay()
    want = run_group(arguments, dys, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)
