"""Groups of tensors in one launch of the Gluon kernels, with and without RoPE, on a GPU."""

import random

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dynconv_hf.kernels import lowrank_gluon
from dynconv_hf.kernels.reference import lowrank_reference
from dynconv_hf.kernels.rotary import Rotary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(lowrank_gluon.MISSING is not None, reason=str(lowrank_gluon.MISSING)),
]

MHA, GQA, SMALL = (2048, 2048, 2048), (2048, 512, 512), (384, 128, 128)


class Group:
    """Inputs of one call for tensors of these channels."""

    def __init__(
        self,
        batch,
        tokens,
        channels,
        head_dim=None,
        rotated=(True, True, False),
        shared_angles=False,
        rank=15,
        static=True,
        residual=True,
        positions=False,
        state=False,
        parameters=torch.bfloat16,
        seed=0,
    ):
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.channels, self.residual = channels, residual
        self.xs = [self.random(batch, tokens, d) for d in channels]
        self.dys = [self.random(batch, tokens, d) for d in channels]
        # As the model makes them: one product for all filters, padded to 16 columns each.
        self.coefficients = self.random(batch, tokens, len(channels), 16, scale=0.3)[..., :rank]
        self.bases = [self.random(rank, 4, d, scale=0.3, dtype=parameters) for d in channels]
        self.statics = [self.random(4, d, scale=0.3, dtype=parameters) if static else None for d in channels]
        self.states = [self.random(batch, 3, d) if state else None for d in channels]
        self.positions = None
        if positions:
            lengths = torch.randint(1, 40, (batch, tokens), generator=self.generator, device="cuda")
            start = torch.randint(-3, 3, (batch, 1), generator=self.generator, device="cuda")
            self.positions = torch.arange(tokens, device="cuda") % lengths[:, :1] + start
        self.rotary = None
        if head_dim is not None:
            position = torch.rand((1 if shared_angles else batch, tokens, 1), generator=self.generator, device="cuda")
            frequencies = 0.7 ** torch.arange(head_dim // 2, device="cuda")
            angles = position.mul(1000).floor() * torch.cat((frequencies, frequencies))
            self.rotary = Rotary((1.1 * angles.cos()).bfloat16(), (1.1 * angles.sin()).bfloat16(), head_dim, rotated)

    def random(self, *shape, scale=1.0, dtype=torch.bfloat16):
        return (torch.randn(shape, generator=self.generator, device="cuda") * scale).to(dtype)

    def run(self):
        """ys, dxs, dcoefficients, dbases, dstatics, dstates."""
        shared = (self.residual, self.positions, self.states, self.rotary)
        inputs = (self.xs, self.coefficients, self.bases, self.statics)
        assert lowrank_gluon.covers_group(*inputs, *shared[1:]) is None
        ys = lowrank_gluon.forward_group(*inputs, *shared)
        return ys, *lowrank_gluon.backward_group(self.dys, *inputs, *shared)

    def rotate(self, y, member):
        """What follows the convolution: transformers' RoPE or nothing."""
        if self.rotary is None or not self.rotary.rotated[member]:
            return y
        heads = y.unflatten(-1, (-1, self.rotary.head_dim)).transpose(1, 2)
        cos, sin = self.rotary.cos.to(y.dtype), self.rotary.sin.to(y.dtype)
        return apply_rotary_pos_emb(heads, heads, cos, sin)[0].transpose(1, 2).flatten(2)

    def rotate_back(self, dy, member):
        y = torch.zeros_like(dy, requires_grad=True)
        return torch.autograd.grad(self.rotate(y, member), y, dy)[0]

    def check_ungrouped(self):
        """The same bits as the convolution of each tensor for itself, and transformers' RoPE after it."""
        ys, dxs, dcoefficients, *_, dstates = self.run()
        for i, (y, dx) in enumerate(zip(ys, dxs, strict=True)):
            inputs = (self.xs[i], self.coefficients[:, :, i], self.bases[i], self.statics[i], self.residual)
            inputs = (*inputs, self.positions, self.states[i])
            assert torch.equal(y, self.rotate(lowrank_gluon.forward(*inputs), i))
            one = lowrank_gluon.backward(self.rotate_back(self.dys[i], i), *inputs)
            assert torch.equal(dx, one[0])
            # A sum over channels, which RoPE has in another order.
            torch.testing.assert_close(dcoefficients[:, :, i], one[1])
            if dstates[i] is None:
                assert one[4] is None
            else:
                # A sum that may cancel: the last bit of one term is more than that of the sum.
                assert (dstates[i] - one[4]).float().norm() <= 4e-3 * one[4].float().norm()

    def check(self):
        got = self.run()
        # Each rounding to bfloat16 adds 1.7e-3 in quadrature, more where few tokens are summed; RoPE adds two.
        as_usual = self.rotary is None and self.bases[0].dtype == torch.bfloat16 and self.xs[0].shape[1] >= 64
        limit = 3e-3 if as_usual else 4.1e-3
        for i, channels in enumerate(self.channels):
            inputs = (self.xs[i], self.coefficients[:, :, i], self.bases[i], self.statics[i], self.states[i])
            leaves = [None if a is None else a.double().requires_grad_() for a in inputs]
            x, coefficients, basis, static, state = leaves
            options = {"residual": self.residual, "positions_BT": self.positions, "initial_state_BSD": state}
            conv, _ = lowrank_reference(x, coefficients, basis, static_filter_WD=static, **options)
            y = self.rotate(conv, i)
            y.backward(self.dys[i].double())
            want = y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)
            like = (self.xs[i], *inputs)
            names = ("y", "dx", "dcoefficients", "dbasis", "dstatic", "dstate")
            for name, a, b, source in zip(names, self.member(got, i), want, like, strict=True):
                if b is None:
                    assert a is None, name
                    continue
                assert a.shape == b.shape and a.dtype == source.dtype, name
                error = ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
                assert error < (limit if b.numel() >= 512 else 0.1), f"{name} of {channels}: {error:.2e}"

    @staticmethod
    def member(got, i):
        ys, dxs, dcoefficients, dbases, dstatics, dstates = got
        return ys[i], dxs[i], dcoefficients[:, :, i], dbases[i], dstatics[i], dstates[i]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is nan, so that what no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("head_dim", [None, 32, 64, 128])
@pytest.mark.parametrize("channels", [MHA, GQA, SMALL, (256,), (128, 256, 512, 1024)])
def test_same_bits_as_one_by_one(channels, head_dim, monkeypatch):
    rotated = tuple(i != 2 for i in range(len(channels)))
    # The same division of work for the group and for its members, or sums of dx and dz would differ in their order.
    warps = 8 if all(size % 256 == 0 for size in channels) else 4
    for run_length, tokens in ((64, 1024), (128, 2500), (10, 77), (8, 3)):
        plan = lowrank_gluon.Plan(warps, 128, run_length, -(-tokens // (8 * run_length)))
        monkeypatch.setattr(lowrank_gluon, "plan_backward_group", lambda *shape, plan=plan: plan)
        for masked in (False, True):
            options = {"positions": masked, "state": masked, "shared_angles": masked, "seed": tokens}
            Group(2, tokens, channels, head_dim, rotated, **options).check_ungrouped()


@pytest.mark.parametrize("head_dim", [None, 64, 128])
@pytest.mark.parametrize("channels", [MHA, GQA])
def test_grids_of_several_waves(channels, head_dim):
    Group(4, 4096, channels, head_dim).check()
    Group(3, 5000, channels, head_dim, positions=True, state=True, shared_angles=True).check()


@pytest.mark.parametrize("seed", range(16))
def test_random_groups(seed):
    """Many shapes for each set of kernels: B, T and channels do not compile anew."""
    draw = random.Random(seed)
    members = draw.randint(1, 4)
    head_dim = draw.choice([None, 32, 64, 128])
    static = draw.random() < 0.7
    options = {
        "head_dim": head_dim,
        "rotated": tuple(draw.random() < 0.6 for _ in range(members)),
        "shared_angles": draw.random() < 0.5,
        "rank": draw.choice([1, 3, 8, 15, 15 if static else 16]),
        "static": static,
        "residual": draw.random() < 0.7,
        "positions": draw.random() < 0.4,
        "state": draw.random() < 0.4,
        "parameters": torch.float32 if draw.random() < 0.3 else torch.bfloat16,
    }
    unit = draw.choice([128, 256])
    for tokens in (1, 2, 3, 7, 64, 128, 1024, *(draw.randint(1, 3000) for _ in range(8))):
        channels = tuple(unit * draw.randint(1, 4) for _ in range(members))
        Group(draw.randint(1, 4), tokens, channels, **options, seed=tokens).check()


def test_slices_of_a_fused_projection():
    group = Group(2, 300, SMALL, 64)
    wide = group.random(2, 300, sum(SMALL) + 8)
    group.xs = list(wide[..., 8:].split(SMALL, -1))
    group.check()
    group.coefficients = group.random(2, 300, 15, 3, scale=0.3).transpose(2, 3)
    group.dys = [dy.transpose(0, 1).contiguous().transpose(0, 1) for dy in group.dys]
    group.rotary = group.rotary._replace(cos=group.rotary.cos[:1].expand(2, -1, -1))
    group.check()


@pytest.mark.parametrize("channels", [GQA, SMALL])
def test_the_same_bits_every_time(channels):
    group = Group(2, 2000, channels, 128, positions=True, state=True)
    first = tree_leaves(group.run())
    for _ in range(10):
        for a, b in zip(first, tree_leaves(group.run()), strict=True):
            assert torch.equal(a, b)
