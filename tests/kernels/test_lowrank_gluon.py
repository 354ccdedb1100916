"""The Gluon path of the low-rank convolution on a GPU, against the reference in float64."""

import random

import pytest
import torch

from dynconv_hf.kernels import lowrank_gluon
from dynconv_hf.kernels.reference import lowrank_reference

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
needs_gluon = pytest.mark.skipif(lowrank_gluon.MISSING is not None, reason=str(lowrank_gluon.MISSING))


class Case:
    """Inputs of one call, inside buffers of nan: whoever reads beside them and uses it shows."""

    def __init__(
        self,
        batch,
        tokens,
        channels,
        rank=15,
        static=True,
        residual=True,
        positions=False,
        state=False,
        parameters=torch.bfloat16,
        seed=0,
    ):
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.x = self.guarded(batch, tokens, channels)
        self.dy = self.guarded(batch, tokens, channels)
        self.coefficients = self.guarded(batch, tokens, rank, scale=0.3)
        self.basis = self.guarded(rank, 4, channels, scale=0.3, dtype=parameters)
        self.static = self.guarded(4, channels, scale=0.3, dtype=parameters) if static else None
        self.state = self.guarded(batch, 3, channels) if state else None
        self.positions = None
        if positions:
            # Documents of 1 to 40 tokens, and padding, which has negative positions.
            lengths = torch.randint(1, 40, (batch, tokens), generator=self.generator, device="cuda")
            start = torch.randint(-3, 3, (batch, 1), generator=self.generator, device="cuda")
            self.positions = torch.arange(tokens, device="cuda") % lengths[:, :1] + start
        self.residual = residual

    def guarded(self, *shape, scale=1.0, dtype=torch.bfloat16):
        size = torch.Size(shape).numel()
        guard = 8 * 4096
        buffer = torch.full((size + 2 * guard,), float("nan"), device="cuda", dtype=dtype)
        inside = buffer[guard : guard + size].view(shape)
        inside.copy_(torch.randn(shape, generator=self.generator, device="cuda") * scale)
        return inside

    def inputs(self):
        return self.x, self.coefficients, self.basis, self.static

    def run(self):
        """y, dx, dcoefficients, dbasis, dstatic, dstate."""
        y = lowrank_gluon.forward(*self.inputs(), self.residual, self.positions, self.state)
        gradients = lowrank_gluon.backward(self.dy, *self.inputs(), self.residual, self.positions, self.state)
        return y, *gradients

    def expected(self):
        leaves = [None if a is None else a.double().requires_grad_() for a in (*self.inputs(), self.state)]
        x, coefficients, basis, static, state = leaves
        y, _ = lowrank_reference(
            x,
            coefficients,
            basis,
            static_filter_WD=static,
            residual=self.residual,
            positions_BT=self.positions,
            initial_state_BSD=state,
        )
        y.backward(self.dy.double())
        return y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)

    def check(self, tolerance=3e-3):
        got, want = self.run(), self.expected()
        names = ("y", "dx", "dcoefficients", "dbasis", "dstatic", "dstate")
        like = (self.x, *self.inputs(), self.state)
        for name, a, b, source in zip(names, got, want, like, strict=True):
            if b is None:
                assert a is None, name
                continue
            assert a.shape == b.shape and a.dtype == source.dtype, name
            # Of a few numbers, each a sum of many terms, all may happen to be near zero.
            limit = tolerance if b.numel() >= 512 else 0.1
            error = ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
            assert error < limit, f"{name}: {error:.2e}"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is nan, so that what no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@gpu
@needs_gpu
@needs_gluon
@pytest.mark.parametrize("run_length", [8, 10, 16, 30, 64, 96, 128])
@pytest.mark.parametrize(("tokens", "warps"), [(1024, 8), (1000, 8), (1000, 4), (1999, 8)])
def test_every_run_length(run_length, tokens, warps, monkeypatch):
    chunks = -(-tokens // (8 * run_length))
    plan = lowrank_gluon.Plan(warps, 128, run_length, chunks)
    monkeypatch.setattr(lowrank_gluon, "plan_backward_group", lambda *shape: plan)
    Case(2, tokens, 512, state=True, seed=run_length).check()
    Case(2, tokens, 512, positions=True, state=True, seed=run_length).check()


@gpu
@needs_gpu
@needs_gluon
@pytest.mark.parametrize("shape", [(4, 4096, 2048), (16, 4096, 2048), (3, 4100, 1152), (1, 20000, 4096)])
def test_grids_of_several_waves(shape):
    Case(*shape).check()


@gpu
@needs_gpu
@needs_gluon
@pytest.mark.parametrize("seed", range(24))
def test_random_cases(seed):
    """Many shapes for each set of kernels: B and T do not compile anew."""
    draw = random.Random(seed)
    static = draw.random() < 0.7
    mixed = draw.random() < 0.3
    options = {
        "channels": 128 * draw.randint(1, 9),
        "rank": draw.choice([1, 2, 3, 8, 14, 15, 15 if static else 16]),
        "static": static,
        "residual": draw.random() < 0.7,
        "positions": draw.random() < 0.4,
        "state": draw.random() < 0.4,
        "parameters": torch.float32 if mixed else torch.bfloat16,
    }
    for tokens in (1, 2, 3, 4, 7, 63, 64, 65, 128, 1024, *(draw.randint(1, 3000) for _ in range(15))):
        case = Case(draw.randint(1, 5), tokens, **options, seed=tokens)
        case.check(3.5e-3 if mixed else 3e-3)


@gpu
@needs_gpu
@needs_gluon
@pytest.mark.parametrize("shape", [(4, 4096, 2048), (2, 1000, 384)])
def test_the_same_bits_every_time(shape):
    case = Case(*shape, positions=True, state=True)
    first = case.run()
    for _ in range(10):
        for a, b in zip(first, case.run(), strict=True):
            assert torch.equal(a, b)


@gpu
@needs_gpu
@needs_gluon
def test_strided_inputs():
    case = Case(2, 300, 384)
    wide = torch.randn(2, 300, 3 * 384 + 45, device="cuda").bfloat16()
    case.x, case.coefficients = wide[..., 384:768], wide[..., 3 * 384 + 15 : 3 * 384 + 30]
    case.check()
    case.x = wide[..., 1:385]
    case.dy = case.dy.transpose(0, 1).contiguous().transpose(0, 1)
    case.basis = case.basis.transpose(0, 2).contiguous().transpose(0, 2)
    case.check()


@gpu
@needs_gpu
@needs_gluon
def test_what_lies_outside_a_sequence_does_not_leak():
    case = Case(2, 200, 256, positions=True)
    case.positions = (torch.arange(200, device="cuda") % 50).expand(2, -1).clone()
    case.x[:, 45:50] = float("inf")
    case.dy[:, 45:50] = 0
    y, dx, *_ = case.run()
    assert y[:, 50:95].isfinite().all()
    assert dx[:, 50:95].isfinite().all()
