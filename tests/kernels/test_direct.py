"""The kernels for filters in memory: what is theirs alone, such as runs of tokens and taps packed into words."""

import dataclasses

import pytest
import torch

from dynconv_hf.kernels import headwise_dynamic_conv1d
from dynconv_hf.kernels.direct import _word_bits

from .cases import TOLERANCE, Case, errors, run, tolerance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(case: Case) -> None:
    found = errors(case)
    too_large = {name: error for name, error in found.items() if not error <= tolerance(case)}
    assert not too_large, f"{too_large} in {case}"


# The forward's programs own 4 runs of 8 tokens here: a program and a run more or less, a token more or less.
@pytest.mark.parametrize("tokens", [7, 8, 9, 31, 32, 33, 65])
@pytest.mark.parametrize("mode", ["headwise", "static"])
def test_ends_of_runs(mode: str, tokens: int) -> None:
    check(
        Case(
            mode,
            tokens=tokens,
            channels=256,
            heads=16,
            dtype=torch.bfloat16,
            positions="packed",
            state=True,
            device=DEVICE,
        )
    )


@pytest.mark.parametrize("kernel_size", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_words_of_taps(dtype: torch.dtype, kernel_size: int) -> None:
    case = Case("headwise", 1, 9, 48, kernel_size, heads=8, dtype=dtype, state=True, device=DEVICE)
    check(dataclasses.replace(case, static=kernel_size % 2 == 0))


def test_a_word_divides_taps_and_offsets() -> None:
    halves = torch.zeros(16, dtype=torch.bfloat16)
    assert _word_bits(halves, 4) == 64
    assert _word_bits(halves, 2) == 32
    assert _word_bits(halves, 3) == 16
    assert _word_bits(halves, 4, (6,)) == 32
    assert _word_bits(halves[2:], 4) == 32
    assert _word_bits(halves[1:], 4) == 16
    assert _word_bits(halves, 4, lanes=2) == 32
    assert _word_bits(halves, 4, lanes=16) == 16
    assert _word_bits(halves.float(), 4) == 64


@pytest.mark.parametrize("offset", [1, 2])
def test_filters_that_start_anywhere(offset: int) -> None:
    """A slice of a fused projection need not start at a multiple of 8 bytes."""
    case = Case("headwise", dtype=torch.bfloat16, channels=64, heads=16, device=DEVICE)
    inputs, dy = case.inputs(), case.output_gradient()
    expected = run(case, inputs, dy, "triton")
    batch, tokens, heads, kernel_size = inputs["filters"].shape
    wide = torch.zeros(batch, tokens, heads * kernel_size + 5, dtype=torch.bfloat16, device=DEVICE)
    filters = wide[..., offset : offset + heads * kernel_size].unflatten(-1, (heads, kernel_size))
    filters.copy_(inputs["filters"].detach())
    got = run(case, {**inputs, "filters": filters.requires_grad_()}, dy, "triton")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    tokens, channels = 2**20 + 17, 2064
    x = torch.randn(1, tokens, channels, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    f = torch.randn(1, tokens, channels // 16, 4, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y = headwise_dynamic_conv1d(x, f, impl="triton")
    y.backward(torch.ones_like(y))
    last = slice(tokens - 100, tokens)
    short_x, short_f = (a[:, last].detach().double().requires_grad_() for a in (x, f))
    want = headwise_dynamic_conv1d(short_x, short_f, impl="reference")
    want.backward(torch.ones_like(want))
    for got, expected in ((y[:, last], want), (x.grad[:, last], short_x.grad), (f.grad[:, last], short_f.grad)):
        got, expected = got[:, 3:].double(), expected[:, 3:]
        assert (got - expected).norm() / expected.norm() < TOLERANCE[torch.bfloat16]
