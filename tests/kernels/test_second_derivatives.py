"""Differentiated other than once and backwards, the kernels give way to the formula, or an error says what to set."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

from dynconv_hf.kernels import describe_implementation, lowrank_dynamic_conv1d_group, static_conv1d

from .cases import Case, operation
from .group_cases import GroupCase

Tensors = dict[str, torch.Tensor | list[torch.Tensor]]


def second_gradients(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of the norm of the gradient of a function that is not linear in the convolution's output."""
    gradients = torch.autograd.grad(function(), leaves, create_graph=True)
    return list(torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), leaves))


def in_float64(arguments: dict) -> dict:
    def double(value):
        if isinstance(value, list):
            return [double(item) for item in value]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return {name: double(value) for name, value in arguments.items()}


def leaves_of(arguments: dict) -> list[torch.Tensor]:
    values = [item for value in arguments.values() for item in (value if isinstance(value, list) else [value])]
    return [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]


def check(function: Callable[[dict, str], torch.Tensor], arguments: dict) -> None:
    exact = in_float64(arguments)
    got = second_gradients(lambda: function(arguments, "triton"), leaves_of(arguments))
    want = second_gradients(lambda: function(exact, "reference"), leaves_of(exact))
    for found, expected in zip(got, want, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["lowrank", "headwise", "static"])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "all arguments"])
def test_second_derivatives_are_those_of_float64(mode: str, full: bool, device: torch.device) -> None:
    case = Case(
        mode, 1, 6, 8, 3, heads=4, static=full, state=full, positions="packed" if full else "none", device=device
    )

    def function(inputs: dict, impl: str) -> torch.Tensor:
        return operation(mode)(**inputs, positions=case.token_positions(), impl=impl).sin().sum()

    check(function, case.inputs())


def test_second_derivatives_of_a_group_are_those_of_float64(device: torch.device) -> None:
    case = GroupCase(1, 6, channels=(8, 8, 8), kernel_size=3, rank=2, device=device)

    def function(arguments: dict, impl: str) -> torch.Tensor:
        rotary = arguments["rotary"]
        if rotary is not None and impl == "reference":
            arguments = {**arguments, "rotary": rotary._replace(cos=rotary.cos.double(), sin=rotary.sin.double())}
        return sum(y.sin().sum() for y in lowrank_dynamic_conv1d_group(**arguments, impl=impl))

    check(function, case.arguments())


def test_filters_made_from_x_keep_their_own_history(device: torch.device) -> None:
    """The formula's derivative by x must not go through what made the filters a second time."""
    x = torch.randn(1, 6, 8, device=device, requires_grad=True)

    def function(arguments: dict, impl: str) -> torch.Tensor:
        x = arguments["x"]
        return operation("headwise")(x, x.sin().unflatten(-1, (2, 4)), impl=impl).sin().sum()

    check(function, {"x": x})


TRANSFORMED = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(x.expand(2, *x.shape)),
}


def dual_tangent(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


@pytest.mark.parametrize("how", [*TRANSFORMED.values(), dual_tangent], ids=[*TRANSFORMED, "forward mode"])
def test_transformations_run_the_formula(how: Callable, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNCONV_IMPL", raising=False)
    x, static_filter = torch.randn(1, 4, 3, device=device), torch.randn(2, 3, device=device)
    reasons = []

    def function(x: torch.Tensor, impl: str) -> torch.Tensor:
        reasons.append(describe_implementation(x, impl=impl).name)
        return static_conv1d(x, static_filter, impl=impl).sin().sum()

    want = how(lambda x: function(x, "reference"), x)
    torch.testing.assert_close(how(lambda x: function(x, "auto"), x), want)
    assert set(reasons) == {"reference"}
    with pytest.raises(ValueError, match=r"'triton', which cannot run: .* convolution .*DYNCONV_IMPL=reference"):
        how(lambda x: function(x, "triton"), x)


def test_batches_of_gradients_are_refused_by_a_group(device: torch.device) -> None:
    arguments = GroupCase(1, 4, channels=(8, 8, 8), kernel_size=2, rank=2, device=device).arguments()
    y = lowrank_dynamic_conv1d_group(**arguments, impl="triton")[0]
    with pytest.raises(ValueError, match=r"not a batch .*DYNCONV_IMPL=reference"):
        torch.autograd.grad(y, leaves_of(arguments)[0], torch.ones(2, *y.shape, device=device), is_grads_batched=True)
