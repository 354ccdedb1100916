"""The decode step in PyTorch against the operation over whole sequences, whose formula is another piece of code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynconv_hf.kernels.decode_reference import decode_step_reference
from dynconv_hf.kernels.reference import lowrank_reference
from dynconv_hf.kernels.rotary import Rotary, rotate

HEAD, RANK, HIDDEN = 4, 3, 5


@given(
    batch=st.integers(1, 3),
    heads=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    kernel_size=st.integers(2, 8),
    static=st.booleans(),
    residual=st.booleans(),
    marked=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_as_the_operation(batch, heads, kernel_size, static, residual, marked, turned, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_states, widths = draw(batch, 1, HIDDEN), [count * HEAD for count in heads]
    xs, weights = [draw(batch, 1, width) for width in widths], [draw(RANK, HIDDEN) for _ in widths]
    bases = [draw(RANK, kernel_size, width) for width in widths]
    statics = [draw(kernel_size, width) for width in widths] if static else []
    states = [draw(batch, width, kernel_size - 1) for width in widths]
    before = [state.clone() for state in states]
    positions = torch.randint(0, kernel_size + 1, (batch, 1), generator=generator) if marked else None
    rotary = Rotary(draw(batch, 1, HEAD), draw(batch, 1, HEAD), HEAD, (True, False, True)[: len(xs)])
    rotary = rotary if turned else None

    tensors = (hidden_states, xs, weights, bases, statics, states, positions)
    ys = decode_step_reference(*tensors, rotary, residual)

    for g, (x, y) in enumerate(zip(xs, ys, strict=True)):
        expected, final = lowrank_reference(
            x.repeat(1, 2, 1),  # two tokens take the way over sequences; the first is the one asked for
            (hidden_states @ weights[g].T).repeat(1, 2, 1),
            bases[g],
            static_filter_WD=statics[g] if static else None,
            residual=residual,
            positions_BT=None if positions is None else positions.repeat(1, 2),
            initial_state_BSD=before[g].transpose(1, 2),
        )
        expected = expected[:, :1]
        if rotary is not None and rotary.rotated[g]:
            expected = rotate(expected, rotary)
        torch.testing.assert_close(y, expected)
        shifted = torch.cat([before[g], x.transpose(1, 2)], dim=-1)[..., 1:]
        assert torch.equal(states[g], shifted)
        assert final.shape == (batch, kernel_size - 1, x.shape[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"h": (1, 1, HIDDEN), "x": (1, 1, 8), "w": (RANK, HIDDEN), "u": (RANK, 4, 8), "s": (1, 8, 3)}
    values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    def run(wide):
        h, x, w, u, s = (values[name].to(wide).clone() for name in "hxwus")
        # The coefficients are rounded to the weights' dtype, in every implementation.
        return decode_step_reference(h, [x], [w], [u], [], [s], None, None, True)[0]

    torch.testing.assert_close(run(dtype).double(), run(torch.float64), atol=0.1, rtol=4 * torch.finfo(dtype).eps)
