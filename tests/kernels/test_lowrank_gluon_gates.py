"""What the Gluon path of the low-rank convolution promises without a GPU: what it covers, and no spilled registers."""

import pytest
import torch

from dynconv_hf.kernels import lowrank_gluon
from dynconv_hf.kernels.rotary import Rotary

from .processes import rows_of

needs_gluon = pytest.mark.skipif(lowrank_gluon.MISSING is not None, reason=str(lowrank_gluon.MISSING))


def call(batch=2, tokens=100, channels=256, rank=15, kernel_size=4, static=True, dtype=torch.bfloat16, parameter=None):
    x = torch.empty(batch, tokens, channels, dtype=dtype)
    coefficients = torch.empty(batch, tokens, rank, dtype=dtype)
    basis = torch.empty(rank, kernel_size, channels, dtype=parameter or dtype)
    static_filter = torch.empty(kernel_size, channels, dtype=parameter or dtype) if static else None
    return lowrank_gluon.covers(x, coefficients, basis, static_filter, None, None)


@needs_gluon
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "no NVIDIA GPU"),
        ({"rank": 16, "static": False}, "no NVIDIA GPU"),
        ({"parameter": torch.float32}, "no NVIDIA GPU"),
        ({"rank": 16}, "R is 16"),
        ({"rank": 17, "static": False}, "R is 17"),
        ({"kernel_size": 3}, "W is 3"),
        ({"channels": 192}, "D is 192"),
        ({"channels": 0}, "D is 0"),
        ({"batch": 0}, "empty"),
        ({"tokens": 0}, "empty"),
        ({"batch": 70000, "tokens": 1, "rank": 1, "channels": 128}, "B, T are 70000, 1"),
        ({"dtype": torch.float16}, "x is torch.float16"),
        ({"parameter": torch.float64}, "a parameter is torch.float64"),
    ],
)
def test_covers_says_why_not(options, reason):
    assert reason in call(**options)


def group_call(
    channels=(256, 128), rotated=(True, False), head_dim=64, rotary_dim=None, dtype=torch.bfloat16, **options
):
    members = len(channels)
    statics = options.get("statics", [torch.empty(4, d, dtype=dtype) for d in channels])
    angles = torch.empty(1, 100, rotary_dim or head_dim, dtype=options.get("angles", dtype))
    return lowrank_gluon.covers_group(
        [torch.empty(2, 100, d, dtype=torch.bfloat16) for d in channels],
        torch.empty(2, 100, members, 15, dtype=torch.bfloat16),
        [torch.empty(15, 4, d, dtype=dtype) for d in channels],
        statics,
        None,
        [None] * members,
        Rotary(angles, angles, head_dim, rotated),
    )


@needs_gluon
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "no NVIDIA GPU"),
        ({"channels": (256, 192)}, "D is 192"),
        ({"head_dim": 96}, "heads of 96"),
        ({"head_dim": 96, "rotated": (False, False)}, "no NVIDIA GPU"),
        ({"rotary_dim": 32}, "32 of the 64"),
        ({"angles": torch.float32}, "cos and sin are torch.float32"),
        ({"statics": [torch.empty(4, 256), torch.empty(4, 128).bfloat16()]}, "mixes torch.bfloat16 and torch.float32"),
        ({"statics": [torch.empty(4, 256), None]}, "mixes None and torch.float32"),
    ],
)
def test_covers_group_says_why_not(options, reason):
    assert reason in group_call(**options)


@needs_gluon
@pytest.mark.parametrize(("processors", "shared_memory"), [(132, 232448), (108, 166912), (128, 101376), (46, 101376)])
@pytest.mark.parametrize("channels", [(128,), (256,), (1152,), (2048, 512, 512), (384, 384, 256), (8192,)])
@pytest.mark.parametrize("head_dim", [0, 64])
@pytest.mark.parametrize("tokens", [1, 7, 100, 4096, 5000, 131072])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_plan_covers_all_tokens_within_the_device(batch, tokens, channels, head_dim, processors, shared_memory):
    plan = lowrank_gluon.divide_work(batch, tokens, channels, head_dim, processors, shared_memory)
    assert all(size % (32 * plan.warps) == 0 for size in channels)
    assert plan.run_length % 2 == 0 and 8 <= plan.run_length <= plan.max_run_length
    assert 0 <= plan.chunks * 8 * plan.run_length - tokens < 8 * plan.run_length
    assert lowrank_gluon._shared_memory(plan.warps, plan.max_run_length, head_dim) <= shared_memory


@needs_gluon
def test_the_plan_of_the_usual_shape_is_one_full_wave():
    assert lowrank_gluon.divide_work(4, 4096, (2048,), 0, 132, 232448) == (8, 256, 128, 4)


def test_nothing_spills():
    spilled = {row["case"]: row["spilled"] for row in rows_of("gluon_artefacts.py")}
    assert len(spilled) == 33
    assert not any(spilled.values()), spilled
