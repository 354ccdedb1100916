"""The decode step: one token of a group of tensors against the operation, filters, states and RoPE one by one."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dynconv_hf.kernels import decode_ops, lowrank_dynamic_conv1d_update
from dynconv_hf.kernels.decode_ops import decode_step
from dynconv_hf.kernels.namespace import NAMESPACE
from dynconv_hf.kernels.rotary import Rotary, rotate

from .cases import HALVES, TOLERANCE


@dataclass
class Step:
    """One token: its shapes, its types, and which optional arguments it has."""

    batch: int = 2
    hidden: int = 40
    heads: Sequence[int] = (4, 2, 2)
    head_dim: int = 8
    rank: int = 15
    kernel_size: int = 4
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    static: bool = True
    residual: bool = True
    rotated: Sequence[bool] = (True, True, False)
    rotary_dim: int | None = 8
    positions: str = "each"
    one_rope: bool = False
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def arguments(self) -> dict:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(self.device)

        b, w, parameters = self.batch, self.kernel_size, self.parameter_dtype
        channels = [heads * self.head_dim for heads in self.heads]
        positions, cos, sin = None, None, None
        if self.positions != "none":
            rows = b if self.positions == "each" else 1
            positions = torch.randint(-1, w + 1, (rows, 1), generator=generator, dtype=torch.int32).to(self.device)
        if self.rotary_dim is not None:
            angle = torch.rand(1 if self.one_rope else b, 1, self.rotary_dim // 2, generator=generator) * 6.3
            angle = torch.cat([angle, angle], dim=-1)
            cos, sin = (f(angle).to(self.dtype).to(self.device) for f in (torch.cos, torch.sin))
        return {
            "hidden_states": random(b, 1, self.hidden, dtype=self.dtype),
            "xs": [random(b, 1, d, dtype=self.dtype) for d in channels],
            "filter_weights": [random(self.rank, self.hidden, dtype=parameters, scale=0.1) for _ in channels],
            "bases": [random(self.rank, w, d, dtype=parameters, scale=0.3) for d in channels],
            "static_filters": [random(w, d, dtype=parameters) for d in channels] if self.static else [],
            "states": [random(b, d, w - 1, dtype=self.dtype) for d in channels],
            "positions": positions,
            "cos": cos,
            "sin": sin,
            "head_dim": self.head_dim,
            "rotated": list(self.rotated),
            "residual": self.residual,
        }


def in_float64(arguments: dict) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The outputs, rounded to x's dtype before RoPE and in it, and the new states; the coefficients as the layer's."""
    a, outputs, states = arguments, [], []
    for g, x in enumerate(a["xs"]):
        weight = a["filter_weights"][g]
        z = F.linear(a["hidden_states"].double(), weight.double()).to(weight.dtype)
        state = a["states"][g].transpose(1, 2).double().contiguous()
        y = lowrank_dynamic_conv1d_update(
            x.squeeze(1).double(),
            z.squeeze(1).double(),
            a["bases"][g].double(),
            state,
            static_filter=a["static_filters"][g].double() if a["static_filters"] else None,
            residual=a["residual"],
            positions=None if a["positions"] is None else a["positions"].squeeze(1),
        ).to(x.dtype)
        y = y.unsqueeze(1)
        if a["cos"] is not None and a["rotated"][g]:
            y = rotate(y, Rotary(a["cos"], a["sin"], a["head_dim"], ()))
        outputs.append(y)
        states.append(state.transpose(1, 2).to(x.dtype))
    return outputs, states


def tolerance(step: Step) -> float:
    dtypes = {step.dtype, step.parameter_dtype}
    # The coefficients, the convolution and each step of RoPE are rounded; the interpreter cuts bfloat16 off.
    roundings = 5 if torch.bfloat16 in dtypes else 2
    return roundings * max(TOLERANCE[dtype] for dtype in dtypes)


def check(step: Step) -> list[float]:
    """For each tensor, how many of its elements are right to the last bit."""
    arguments = step.arguments()
    expected, expected_states = in_float64(arguments)
    before = [state.clone() for state in arguments["states"]]
    outputs = decode_step(**arguments)
    places = [state.data_ptr() for state in arguments["states"]]
    for g, (y, want) in enumerate(zip(outputs, expected, strict=False)):
        assert y.dtype == want.dtype and y.shape == want.shape
        # What the sums would be without cancellation: an error of RoPE's terms is one of y's, too.
        scale = want.double().norm() + arguments["xs"][g].double().norm()
        assert (y.double() - want.double()).norm() <= tolerance(step) * scale, g
        assert torch.equal(arguments["states"][g], expected_states[g]), g
    assert [state.data_ptr() for state in arguments["states"]] == places
    for state, old in zip(arguments["states"], before, strict=True):
        state.copy_(old)
    assert all(torch.equal(a, b) for a, b in zip(decode_step(**arguments), outputs, strict=True))
    return [(y == want).double().mean().item() for y, want in zip(outputs, expected, strict=False)]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    head_dim = draw(st.sampled_from([2, 6, 8, 32, 64]))
    heads = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.float32, *HALVES]))
    return Step(
        batch=draw(st.sampled_from([1, 1, 2, 5, 18])),
        hidden=draw(st.sampled_from([1, 7, 40, 256, 300])),
        heads=heads,
        head_dim=head_dim,
        rank=draw(st.sampled_from([1, 3, 15, 16, 17, 40])),
        kernel_size=draw(st.integers(1, 8)),
        dtype=dtype,
        parameter_dtype=draw(st.sampled_from([dtype, torch.float32])),
        static=draw(st.booleans()),
        residual=draw(st.booleans()),
        rotated=[draw(st.booleans()) for _ in heads],
        rotary_dim=draw(st.sampled_from([None, head_dim, head_dim // 2 // 2 * 2 or 2])),
        positions=draw(st.sampled_from(["none", "each", "one"])),
        one_rope=draw(st.booleans()),
        seed=draw(st.integers(0, 100)),
    )


@settings(max_examples=60)
@given(steps())
def test_as_the_operation(step: Step) -> None:
    step.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(step)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", [(1, 1, 1), (50, 7, 129)])
def test_channels_without_heads(batch: int, channels: Sequence[int], device: torch.device) -> None:
    check(Step(batch=batch, heads=channels, head_dim=1, rotary_dim=None, device=device))


@pytest.mark.parametrize("batch", [1, 2])
def test_what_a_token_must_not_see_may_be_nan(batch: int, device: torch.device) -> None:
    arguments = Step(batch=batch, positions="none", device=device).arguments()
    arguments["positions"] = torch.ones(batch, 1, dtype=torch.int32, device=device)
    for state in arguments["states"]:
        state[..., :2] = float("nan")
    for y in decode_step(**arguments):
        assert y.isfinite().all()


def test_an_empty_batch(device: torch.device) -> None:
    outputs = decode_step(**Step(batch=0, device=device).arguments())
    assert [tuple(y.shape) for y in outputs] == [(0, 1, 32), (0, 1, 16), (0, 1, 16)]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_token_of_a_longer_sequence(batch: int, device: torch.device) -> None:
    """Rows that do not follow each other in memory."""
    arguments = Step(batch=batch, device=device).arguments()
    expected = decode_step(**{**arguments, "states": [state.clone() for state in arguments["states"]]})
    for name in ("hidden_states", "cos", "sin", "positions"):
        arguments[name] = torch.cat([arguments[name]] * 2, dim=1)[:, :1]
    arguments["xs"] = [torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in arguments["xs"]]
    for y, want in zip(decode_step(**arguments), expected, strict=True):
        assert torch.equal(y, want)


def at_an_odd_place(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, but not where a number of several elements may begin."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["xs", "states"])
def test_memory_that_is_not_aligned(which: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = Step(batch=3, dtype=dtype, parameter_dtype=dtype, device=device).arguments()
    again = {**arguments, "states": [state.clone() for state in arguments["states"]]}
    again[which] = [at_an_odd_place(tensor) for tensor in again[which]]
    assert all(tensor.data_ptr() % 8 for tensor in again[which])
    for y, want in zip(decode_step(**again), decode_step(**arguments), strict=True):
        assert torch.equal(y, want)
    for state, want in zip(again["states"], arguments["states"], strict=True):
        assert torch.equal(state, want)


def test_opcheck(device: torch.device) -> None:
    step, operator = Step(batch=2, device=device), getattr(torch.ops, NAMESPACE).decode_step.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, tuple(step.arguments().values()), test_utils=tests)


def test_autograd_learns_that_the_states_have_changed(device: torch.device) -> None:
    arguments = Step(device=device).arguments()
    factor = torch.ones(1, device=device, requires_grad=True)
    products = [factor * state for state in arguments["states"]]
    with torch.no_grad():
        decode_step(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        products[0].sum().backward()


def test_the_module_may_be_loaded_again(device: torch.device) -> None:
    arguments = Step(device=device).arguments()
    again = {**arguments, "states": [state.clone() for state in arguments["states"]]}
    expected = decode_step(**arguments)
    for y, want in zip(importlib.reload(decode_ops).decode_step(**again), expected, strict=True):
        assert torch.equal(y, want)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 32, 33])
@pytest.mark.parametrize("heads", [(32, 32, 32), (32, 8, 8)])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_sizes_of_models(batch: int, heads: Sequence[int], dtypes: tuple, device: torch.device) -> None:
    sizes = {"hidden": 2048, "heads": heads, "head_dim": 64, "rotary_dim": 64}
    same = check(Step(batch=batch, dtype=dtypes[0], parameter_dtype=dtypes[1], **sizes, device=device))
    # But for sums so near the middle of two bfloat16 numbers that their order decides.
    assert min(same) > 0.998
