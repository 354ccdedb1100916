"""The Triton kernels against the float64 reference: every result and gradient, over random shapes, types, masks.

How many random cases of each mode: the environment variable DYNCONV_CASES, for instance

    DYNCONV_CASES=170 pytest -k random tests/kernels/test_against_reference.py          # in the interpreter
    DYNCONV_CASES=700 pytest -k random tests/kernels/test_against_reference.py -n 12    # on a GPU
"""

import dataclasses
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dynconv_hf.kernels import lowrank_dynamic_conv1d

from .cases import TOLERANCE, Case, errors, run, tolerance

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("lowrank", "headwise", "static")
CASES = int(os.environ.get("DYNCONV_CASES", "6"))
# pytest-xdist shares out tests, so that many cases must be several tests.
CASES_A_TEST = 50
# The interpreter takes a second for what a GPU does in a millisecond. On a GPU it is compiling that takes time: cases
# share kernels, and differ in the rest.
MOST_TOKENS, MOST_CHANNELS, KERNELS_A_TEST = (700, 300, 8) if ON_GPU else (40, 80, CASES_A_TEST)
TRAINED_CHANNELS = (128, 256, 384) if ON_GPU else (64,)


def random_kernel(draw: random.Random, mode: str) -> Case:
    """What kernels are compiled for."""
    channels = draw.randint(1, MOST_CHANNELS)
    dtype = draw.choice(DTYPES)
    case = Case(
        mode,
        channels=channels,
        kernel_size=draw.randint(1, 8),
        rank=draw.choice((15, draw.randint(1, 20), draw.randint(1, 20), 40)),
        heads=draw.choice([h for h in range(1, channels + 1) if channels % h == 0]),
        dtype=dtype,
        parameter_dtype=draw.choice((dtype, torch.float32)),
        static=draw.random() < 0.5,
        residual=draw.random() < 0.5,
        positions=draw.choice(("none", "any")),
        state=draw.random() < 0.5,
        device=DEVICE,
    )
    if mode == "lowrank" and draw.random() < 0.4:
        # What training runs has kernels of its own.
        trained = {"kernel_size": draw.choice((2, 3, 4, 4)), "rank": 15, "dtype": torch.bfloat16}
        trained["channels"] = draw.choice(TRAINED_CHANNELS)
        case = dataclasses.replace(case, **trained)
    return case


@st.composite
def cases(draw: st.DrawFn, kernels: list[Case]) -> Case:
    kernel = draw(st.sampled_from(kernels))
    return dataclasses.replace(
        kernel,
        batch=draw(st.integers(0, 3)),
        tokens=draw(st.integers(0, MOST_TOKENS)),
        positions="none" if kernel.positions == "none" else draw(st.sampled_from(("packed", "padded", "one"))),
        layout=draw(st.sampled_from(("contiguous", "slice", "channels first", "tokens first"))),
        seed=draw(st.integers(0, 2**16)),
    )


def check(case: Case) -> None:
    found = errors(case)
    too_large = {name: error for name, error in found.items() if not error <= tolerance(case)}
    assert not too_large, f"{too_large} in {case}"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(-(-CASES // CASES_A_TEST)))
@pytest.mark.parametrize("mode", MODES)
def test_random_cases(mode: str, part: int) -> None:
    draw = random.Random(f"{mode} {part}")
    kernels = [random_kernel(draw, mode) for _ in range(KERNELS_A_TEST)]

    @seed(part)
    @settings(
        max_examples=min(CASES_A_TEST, CASES - part * CASES_A_TEST),
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases(kernels))
    def compare(case: Case) -> None:
        check(case)

    compare()


# What training runs, and the boundaries of its tiles: one row more, one row less.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 33])
@pytest.mark.parametrize("positions", ["none", "packed"])
def test_lowrank_as_trained(tokens: int, positions: str, dtype: torch.dtype) -> None:
    check(Case("lowrank", batch=1, tokens=tokens, channels=48, dtype=dtype, positions=positions, device=DEVICE))


# More than one chunk of the one-pass backward; the last one is cut short.
@pytest.mark.parametrize("positions", ["none", "packed", "padded"])
@pytest.mark.parametrize("residual", [False, True])
def test_lowrank_one_pass_backward(positions: str, residual: bool) -> None:
    case = Case("lowrank", 1, 261, 48, dtype=torch.bfloat16, residual=residual, positions=positions, device=DEVICE)
    check(dataclasses.replace(case, static=residual, rank=15 if residual else 16))


@pytest.mark.parametrize("positions", ["none", "packed"])
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_lowrank_one_pass_backward_of_fewer_taps(kernel_size: int, positions: str) -> None:
    check(Case("lowrank", 1, 261, 48, kernel_size, dtype=torch.bfloat16, positions=positions, device=DEVICE))


# Long filters have different kernels for rows by the 16 channels and for others.
@pytest.mark.parametrize("channels", [40, 48])
@pytest.mark.parametrize("kernel_size", [2, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lowrank_kernel_sizes(dtype: torch.dtype, kernel_size: int, channels: int) -> None:
    check(Case("lowrank", 1, 37, channels, kernel_size, dtype=dtype, positions="packed", state=True, device=DEVICE))


@pytest.mark.parametrize("head_size", [1, 2, 3, 4, 16, 64, 192])
def test_headwise_head_sizes(head_size: int) -> None:
    check(Case("headwise", tokens=19, channels=192, heads=192 // head_size, positions="packed", device=DEVICE))


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_each_run(mode: str) -> None:
    case = Case(mode, tokens=65, dtype=torch.bfloat16, positions="packed", state=True, device=DEVICE)
    first, second = (run(case, case.inputs(), case.output_gradient(), "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bad_values_stay_where_they_belong(dtype: torch.dtype, bad: float) -> None:
    """Padding may hold anything: what is not finite reaches the W tokens it belongs to, and no other."""
    case = Case("lowrank", batch=1, tokens=50, channels=20, dtype=dtype, device=DEVICE)
    inputs = {name: a.detach() for name, a in case.inputs().items()}
    inputs["x"][0, 20, 3] = bad
    positions = torch.arange(50, device=DEVICE)[None]
    y = lowrank_dynamic_conv1d(**inputs, positions=positions, impl="triton")
    finite = torch.ones_like(y, dtype=torch.bool)
    finite[0, 20:24, 3] = False
    assert torch.equal(y.isfinite(), finite)
    positions = torch.where(positions > 20, positions - 21, positions)
    y = lowrank_dynamic_conv1d(**inputs, positions=positions, impl="triton")
    finite[0, 21:24, 3] = True
    assert torch.equal(y.isfinite(), finite)


# Three taps are fewer, and five and seven no multiple of what the backwards take at once.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bad_values_reach_only_gradients_of_what_sees_them(bad: float, kernel_size: int, dtype: torch.dtype) -> None:
    case = Case("lowrank", 1, 35, 48, kernel_size, dtype=dtype, parameter_dtype=dtype, device=DEVICE)
    inputs = case.inputs()
    with torch.no_grad():
        inputs["x"][0, 20, 3] = bad
    gradients = run(case, inputs, case.output_gradient(), "triton")
    assert gradients["dx"].isfinite().all()
    finite = gradients["dcoefficients"].isfinite().all(dim=-1)[0]
    assert (~finite).nonzero().flatten().tolist() == list(range(20, 20 + kernel_size))
    for name in ("dbasis", "dstatic_filter"):
        assert gradients[name][..., 4:].isfinite().all() and gradients[name][..., :3].isfinite().all(), name


@pytest.mark.parametrize("mode", MODES)
def test_bad_values_outside_a_document_leave_gradients_alone(mode: str) -> None:
    case = Case(mode, batch=1, tokens=40, static=True, positions="padded", seed=5, device=DEVICE)
    positions, inputs = case.token_positions(), case.inputs()
    padding = positions < 0
    assert padding.any() and not padding.all()
    with torch.no_grad():
        inputs["x"].masked_fill_(padding.unsqueeze(-1), float("nan"))
    dy = case.output_gradient().masked_fill(padding.unsqueeze(-1), 0.0)
    gradients = run(case, inputs, dy, "triton")
    for name in set(gradients) - {"y", "final state"}:
        assert gradients[name].isfinite().all(), name


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("positions", ["none", "packed"])
def test_several_waves(mode: str, positions: str) -> None:
    """The size that is measured: rounding stays within what bfloat16 costs."""
    case = Case(mode, 4, 4096, 2048, heads=128, dtype=torch.bfloat16, parameter_dtype=torch.bfloat16, device=DEVICE)
    case = dataclasses.replace(case, positions=positions)
    assert max(errors(case).values()) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_several_waves_of_fewer_taps(kernel_size: int) -> None:
    case = Case("lowrank", 4, 4096, 2048, kernel_size, dtype=torch.bfloat16, device=DEVICE, positions="packed")
    assert max(errors(dataclasses.replace(case, parameter_dtype=torch.bfloat16)).values()) < 3e-3


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    tokens, channels = 2**20 + 17, 2064
    x = torch.randn(1, tokens, channels, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    z = torch.randn(1, tokens, 15, device=DEVICE, dtype=torch.bfloat16)
    u = torch.randn(15, 4, channels, device=DEVICE, dtype=torch.bfloat16)
    y = lowrank_dynamic_conv1d(x, z, u, impl="triton")
    y.backward(torch.ones_like(y))
    last = slice(tokens - 100, tokens)
    short = x[:, last].detach().double().requires_grad_()
    want = lowrank_dynamic_conv1d(short, z[:, last].double(), u.double(), impl="reference")
    want.backward(torch.ones_like(want))
    for got, expected in ((y[:, last], want), (x.grad[:, last], short.grad)):
        got, expected = got[:, 3:].double(), expected[:, 3:]
        assert (got - expected).norm() / expected.norm() < TOLERANCE[torch.bfloat16]
