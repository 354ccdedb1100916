"""What the Gluon backward leaves to plain Triton kernels, in the interpreter: its partial sums, and the state."""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from dynconv_hf.kernels import lowrank_dynamic_conv1d_group
from dynconv_hf.kernels.lowrank_gluon import RANKS, RUNS, TAPS
from dynconv_hf.kernels.lowrank_gluon_reduction import add_partial_sums, lowrank_state_gradient_kernel

from .group_cases import GroupCase

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of the whole backward run there")


@pytest.fixture(autouse=True)
def spread_truth_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter makes integers of a truth value that is spread over a block, and refuses the mask."""
    create_splat = InterpreterBuilder.create_splat

    def splat(self, block_type, value):
        spread = create_splat(self, block_type, value)
        if value.data.dtype == np.bool_:
            spread.data = spread.data.astype(np.bool_)
        return spread

    monkeypatch.setattr(InterpreterBuilder, "create_splat", splat)


def partial_sums_of_dz(dz_KBTR: torch.Tensor, run_length: int) -> torch.Tensor:
    """(K, B, T, 16) as the backward's thread blocks write it; what lies beyond T is nan, and not to be read."""
    blocks, batch, tokens, _ = dz_KBTR.shape
    chunks = -(-tokens // (RUNS * run_length))
    padded = dz_KBTR.new_full((blocks, batch, chunks * RUNS * run_length, RANKS), float("nan"))
    padded[:, :, :tokens] = dz_KBTR
    # Of a run's tokens, two at a time make a pair; a pair's 16 rows are the first token of each run, then the second.
    runs = padded.view(blocks, batch * chunks, RUNS, run_length // 2, 2, RANKS)
    return runs.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)


@pytest.mark.parametrize(
    ("channels", "block", "batch", "tokens", "run_length"),
    [((512,), 256, 2, 300, 16), ((256, 128, 128), 128, 3, 65, 8), ((128,), 128, 1, 1, 8), ((256,), 256, 18, 5, 8)],
    ids=str,
)
@pytest.mark.parametrize(("rank", "static"), [(1, True), (15, True), (8, False), (16, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_partial_sums_are_added(
    channels: tuple[int, ...],
    block: int,
    batch: int,
    tokens: int,
    run_length: int,
    rank: int,
    static: bool,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    chunks = batch * -(-tokens // (RUNS * run_length))
    dz_KBTR = torch.randn(sum(channels) // block, batch, tokens, RANKS, generator=generator)
    du_CRWD = [torch.randn(chunks, RANKS, TAPS, size, generator=generator) for size in channels]
    dz = torch.full((batch, tokens, len(channels), rank), float("nan"), dtype=dtype)
    dbases = tuple(torch.full((rank, TAPS, size), float("nan"), dtype=dtype) for size in channels)
    dstatics = [torch.full((TAPS, size), float("nan"), dtype=dtype) if static else None for size in channels]
    du_partial = torch.cat([du.flatten() for du in du_CRWD])
    add_partial_sums(partial_sums_of_dz(dz_KBTR, run_length), du_partial, dz, dbases, dstatics)
    of_members = dz_KBTR.split([size // block for size in channels])
    expected_dz = torch.stack([part.sum(0)[..., :rank] for part in of_members], dim=2)
    torch.testing.assert_close(dz, expected_dz.to(dtype))
    for member, du in enumerate(du_CRWD):
        torch.testing.assert_close(dbases[member], du.sum(0)[:rank].to(dtype))
        if static:
            torch.testing.assert_close(dstatics[member], du.sum(0)[rank].to(dtype))


@pytest.mark.parametrize("positions", ["none", "packed"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
@pytest.mark.parametrize(("rank", "static"), [(15, True), (16, False)])
@pytest.mark.parametrize("head_dim", [0, 32])
def test_gradient_of_the_state(positions: str, tokens: int, rank: int, static: bool, head_dim: int) -> None:
    case = GroupCase(
        batch=2,
        tokens=tokens,
        channels=(256, 128, 128),
        rank=rank,
        static=static,
        positions=positions,
        state=True,
        head_dim=head_dim,
        rotary_dim=head_dim,
    )
    arguments, dys = case.arguments(), case.output_gradients()
    ys = lowrank_dynamic_conv1d_group(**arguments, impl="reference")
    states = arguments["initial_states"]
    expected = torch.autograd.grad(ys, states, dys)
    found = tuple(torch.full_like(state, float("nan")) for state in states)
    coefficients, rotary = arguments["coefficients"].detach(), arguments.get("rotary")
    lowrank_state_gradient_kernel[(sum(case.channels) // 128, case.batch)](
        tuple(dys),
        coefficients,
        tuple(arguments["bases"]),
        tuple(arguments["static_filters"]) if static else None,
        arguments["positions"],
        rotary.cos if rotary else None,
        rotary.sin if rotary else None,
        found,
        case.channels,
        tokens,
        coefficients.stride(1),
        coefficients.stride(2),
        tokens,
        R=rank,
        HEAD_DIM=head_dim,
        ROTATED=case.rotated if head_dim else (False,) * 3,
        BLOCK=128,
    )
    for of_member, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(of_member, gradient)
