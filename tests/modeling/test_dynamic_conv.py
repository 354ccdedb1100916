"""The module: parameters, start, gradients, and how it reads its filters."""

import math

import pytest
import torch
from torch import nn

from dynconv_hf import DynamicShortConv
from dynconv_hf.kernels import headwise_dynamic_conv1d, lowrank_dynamic_conv1d, static_conv1d

MODES = ("lowrank", "headwise", "static")


def moved(mode, **kwargs):
    torch.manual_seed(0)
    conv = DynamicShortConv(10, 8, mode=mode, **{"rank": 3, "head_size": 4, **kwargs})
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    return conv


@pytest.mark.parametrize(
    ("mode", "static", "shapes"),
    [
        ("lowrank", True, {"filter_proj.weight": (3, 10), "basis": (3, 4, 8), "static_filter": (4, 8)}),
        ("lowrank", False, {"filter_proj.weight": (3, 10), "basis": (3, 4, 8)}),
        ("headwise", True, {"filter_proj.weight": (8, 10), "static_filter": (4, 8)}),
        ("headwise", False, {"filter_proj.weight": (8, 10)}),
        ("static", True, {"static_filter": (4, 8)}),
    ],
)
def test_parameters_are_the_checkpoint_format(mode, static, shapes):
    conv = DynamicShortConv(10, 8, mode=mode, rank=3, head_size=4, static=static)
    assert {name: tuple(tensor.shape) for name, tensor in conv.state_dict().items()} == shapes


@pytest.mark.parametrize("mode", MODES)
def test_uniform_start(mode):
    x, hidden_states = torch.randn(2, 7, 512), torch.randn(2, 7, 10)
    conv = DynamicShortConv(10, 512, mode=mode, kernel_size=4)
    bound = 1 / math.sqrt(4)
    assert 0.95 * bound < conv.static_filter.abs().max() <= bound
    assert conv.static_filter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    torch.testing.assert_close(conv(x, hidden_states), static_conv1d(x, conv.static_filter))


@pytest.mark.parametrize("mode", MODES)
def test_identity_start(mode):
    x = torch.randn(2, 7, 32)
    assert torch.equal(DynamicShortConv(10, 32, mode=mode, init="identity")(x, torch.randn(2, 7, 10)), x)


def test_lowrank_forward():
    conv, x, hidden_states = moved("lowrank"), torch.randn(2, 7, 8), torch.randn(2, 7, 10)
    coefficients = hidden_states @ conv.filter_proj.weight.T
    expected = lowrank_dynamic_conv1d(x, coefficients, conv.basis, static_filter=conv.static_filter)
    torch.testing.assert_close(conv(x, hidden_states), expected)


def test_headwise_forward():
    conv, x, hidden_states = moved("headwise", residual=False), torch.randn(2, 7, 8), torch.randn(2, 7, 10)
    # Row h * W + w of the projection makes tap w of head h.
    filters = torch.einsum("btc,hwc->bthw", hidden_states, conv.filter_proj.weight.view(2, 4, 10))
    expected = headwise_dynamic_conv1d(x, filters, static_filter=conv.static_filter, residual=False)
    torch.testing.assert_close(conv(x, hidden_states), expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    conv = moved(mode).double()
    names, parameters = zip(*conv.named_parameters(), strict=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    hidden_states = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 0, 1]])

    def function(x, hidden_states, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(conv, state, (x, hidden_states, positions))

    assert torch.autograd.gradcheck(function, (x, hidden_states, *parameters))


@pytest.mark.parametrize("mode", MODES)
def test_float32_parameters_with_bfloat16_activations(mode):
    conv, x, hidden_states = moved(mode), torch.randn(2, 5, 8), torch.randn(2, 5, 10)
    y = conv(x.bfloat16(), hidden_states.bfloat16())
    assert y.dtype == torch.bfloat16
    exact = conv(x.bfloat16().float(), hidden_states.bfloat16().float())
    torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


def test_states_cut_a_sequence():
    conv, x, hidden_states = moved("lowrank"), torch.randn(2, 7, 8), torch.randn(2, 7, 10)
    expected = conv(x, hidden_states)
    first, state = conv(x[:, :3], hidden_states[:, :3], return_final_state=True)
    second = conv(x[:, 3:], hidden_states[:, 3:], initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dense"}, "mode must be .*got 'dense'"),
        ({"mode": "headwise", "head_size": 3}, "head_size must divide the channels, got 3 for 8 channels"),
        ({"mode": "static", "static": False}, 'static must be True in mode "static"'),
        ({"init": "zeros"}, "init must be .*got 'zeros'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"kernel_size": 0}, "kernel_size must be from 1 to 8, got 0"),
        ({"kernel_size": 9}, "kernel_size must be from 1 to 8, got 9"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicShortConv(10, 8, **options)
