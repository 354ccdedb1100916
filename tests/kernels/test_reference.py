"""The eager operation against its formula, its gradients, its states, and its promises on dtypes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynconv_hf import kernels

from . import definition

MODES = ("static", "headwise", "lowrank")


@st.composite
def problems(draw, modes=MODES):
    """A mode and arguments for it: (mode, x, dynamic arguments, options), float64."""
    mode = draw(st.sampled_from(modes))
    kernel_size = draw(st.integers(1, 8))
    batch, tokens = draw(st.integers(0, 3)), draw(st.integers(0, 11))
    heads, head_size, rank = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = heads * head_size
    dynamic = {
        "static": (),
        "headwise": (normal(batch, tokens, heads, kernel_size),),
        "lowrank": (normal(batch, tokens, rank), normal(rank, kernel_size, channels)),
    }[mode]
    has_static = mode == "static" or draw(st.booleans())
    options = {
        "static_filter": normal(kernel_size, channels) if has_static else None,
        "residual": draw(st.booleans()),
        "positions": None,
        "initial_state": normal(batch, kernel_size - 1, channels) if draw(st.booleans()) else None,
    }
    if draw(st.booleans()):
        rows = draw(st.sampled_from([1, batch])) if batch else 1
        options["positions"] = torch.randint(-1, kernel_size + 1, (rows, tokens), generator=generator)
    return mode, normal(batch, tokens, channels), dynamic, options


def run(mode, x, dynamic, options, **more):
    if mode == "static":
        options = dict(options)
        return kernels.static_conv1d(x, options.pop("static_filter"), **options, **more)
    function = {"headwise": kernels.headwise_dynamic_conv1d, "lowrank": kernels.lowrank_dynamic_conv1d}[mode]
    return function(x, *dynamic, **options, **more)


def step(mode, x, dynamic, state, options):
    """One token of x through the `_update` function of the mode."""
    if mode == "static":
        options = dict(options)
        return kernels.static_conv1d_update(x, options.pop("static_filter"), state, **options)
    if mode == "headwise":
        return kernels.headwise_dynamic_conv1d_update(x, *dynamic, state, **options)
    return kernels.lowrank_dynamic_conv1d_update(x, *dynamic, state, **options)


def full_filter(mode, x, dynamic, static_filter):
    """The filter of every token, channel and tap, as numpy (B, T, W, D)."""
    batch, tokens, channels = x.shape
    dynamic = [tensor.numpy() for tensor in dynamic]
    static_filter = None if static_filter is None else static_filter.numpy()
    if mode == "static":
        return np.broadcast_to(static_filter, (batch, tokens, *static_filter.shape))
    if mode == "headwise":
        return definition.headwise_filter(*dynamic, channels, static_filter)
    return definition.lowrank_filter(*dynamic, static_filter)


@given(problems())
def test_equals_the_formula(problem):
    mode, x, dynamic, options = problem
    expected = definition.convolve(
        x.numpy(),
        full_filter(mode, x, dynamic, options["static_filter"]),
        options["residual"],
        None if options["positions"] is None else options["positions"].numpy(),
        None if options["initial_state"] is None else options["initial_state"].numpy(),
    )
    np.testing.assert_allclose(run(mode, x, dynamic, options).numpy(), expected, rtol=1e-11, atol=1e-11)


@given(problems())
def test_input_strides_do_not_matter(problem):
    mode, x, dynamic, options = problem
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    strided = tuple(torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in dynamic)
    torch.testing.assert_close(run(mode, transposed, strided, options), run(mode, x, dynamic, options))


@given(problems(), st.data())
def test_any_cut_into_chunks_equals_the_whole(problem, data):
    mode, x, dynamic, options = problem
    tokens = x.shape[1]
    whole, final_state = run(mode, x, dynamic, options, return_final_state=True)
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=3)))
    outputs, state = [], options["initial_state"]
    for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
        chunk_options = dict(options, initial_state=state)
        if options["positions"] is not None:
            chunk_options["positions"] = options["positions"][:, start:stop]
        # The basis is a parameter: only what is per token is cut.
        chunk = (dynamic[0][:, start:stop], *dynamic[1:]) if dynamic else ()
        y, state = run(mode, x[:, start:stop], chunk, chunk_options, return_final_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    torch.testing.assert_close(state, final_state)


@given(problems())
def test_update_steps_equal_the_whole(problem):
    mode, x, dynamic, options = problem
    expected, final_state = run(mode, x, dynamic, options, return_final_state=True)
    state = torch.zeros_like(final_state) if options["initial_state"] is None else options["initial_state"].clone()
    address = state.data_ptr()
    for t in range(x.shape[1]):
        step_options = {"residual": options["residual"], "static_filter": options["static_filter"]}
        if options["positions"] is not None:
            step_options["positions"] = options["positions"][:, t]
        one_token = (dynamic[0][:, t], *dynamic[1:]) if dynamic else ()
        torch.testing.assert_close(step(mode, x[:, t], one_token, state, step_options), expected[:, t])
    torch.testing.assert_close(state, final_state)
    assert state.data_ptr() == address


@given(problems())
def test_tokens_see_no_later_token(problem):
    mode, x, dynamic, options = problem
    tokens = x.shape[1]
    before = run(mode, x, dynamic, options)
    changed = x.clone()
    changed[:, tokens // 2 :] += 1.0
    after = run(mode, changed, dynamic, options)
    assert torch.equal(before[:, : tokens // 2], after[:, : tokens // 2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_positions", [False, True])
def test_gradients(mode, with_positions):
    torch.manual_seed(0)
    batch, tokens, heads, head_size, rank, kernel_size = 2, 5, 2, 3, 2, 3
    channels = heads * head_size

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    dynamic = {
        "static": (),
        "headwise": (leaf(batch, tokens, heads, kernel_size),),
        "lowrank": (leaf(batch, tokens, rank), leaf(rank, kernel_size, channels)),
    }[mode]
    positions = torch.tensor([[0, 1, 0, 1, 2], [3, 4, 5, 0, 1]]) if with_positions else None

    def function(x, static_filter, initial_state, *dynamic):
        options = {"static_filter": static_filter, "initial_state": initial_state, "positions": positions}
        return run(mode, x, dynamic, options, return_final_state=True)

    inputs = (leaf(batch, tokens, channels), leaf(kernel_size, channels), leaf(batch, kernel_size - 1, channels))
    assert torch.autograd.gradcheck(function, (*inputs, *dynamic))
    assert torch.autograd.gradgradcheck(lambda *a: function(*a)[0], (*inputs, *dynamic))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulates_in_float32_whatever_the_dtypes(mode, dtype, parameter_dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 6).to(dtype)
    dynamic = {
        "static": (),
        "headwise": (torch.randn(2, 9, 3, 8).to(parameter_dtype),),
        "lowrank": (torch.randn(2, 9, 4).to(parameter_dtype), torch.randn(4, 8, 6).to(parameter_dtype)),
    }[mode]
    options = {"static_filter": torch.randn(8, 6).to(parameter_dtype), "initial_state": torch.randn(2, 7, 6)}
    y, final_state = run(mode, x, dynamic, options, return_final_state=True)
    assert y.dtype == dtype and final_state.dtype == dtype
    exact = {key: tensor.double() for key, tensor in options.items()}
    # The state is converted to x's dtype on the way in, as it comes back.
    exact["initial_state"] = options["initial_state"].to(dtype).double()
    expected = run(mode, x.double(), tuple(tensor.double() for tensor in dynamic), exact)
    # One rounding of the result, and float32 noise: anything else would be an accumulation in half precision.
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_accumulates_in_float32_under_autocast():
    torch.manual_seed(0)
    x, z, u = torch.randn(1, 7, 8).bfloat16(), torch.randn(1, 7, 4), torch.randn(4, 4, 8)
    expected = kernels.lowrank_dynamic_conv1d(x, z, u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernels.lowrank_dynamic_conv1d(x, z, u), expected)


def test_what_lies_outside_a_sequence_may_be_nan():
    x = torch.randn(1, 4, 2)
    x[:, 1] = float("nan")
    y = kernels.static_conv1d(x, torch.randn(4, 2), positions=torch.tensor([[0, 1, 0, 1]]))
    assert y[:, 2:].isfinite().all()


def test_the_final_state_does_not_keep_the_inputs_in_memory():
    _, final_state = kernels.static_conv1d(torch.randn(1, 1000, 2), torch.randn(4, 2), return_final_state=True)
    assert final_state.untyped_storage().nbytes() == final_state.nbytes


@pytest.mark.parametrize("mode", MODES)
def test_identity_filters_leave_the_input_as_it_is(mode):
    x = torch.randn(2, 5, 4).bfloat16()
    dynamic = {
        "static": (),
        "headwise": (torch.zeros(2, 5, 2, 4),),
        "lowrank": (torch.randn(2, 5, 3), torch.zeros(3, 4, 4)),
    }[mode]
    assert torch.equal(run(mode, x, dynamic, {"static_filter": torch.zeros(4, 4)}), x)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_a_graph_break(mode):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, requires_grad=True)
    dynamic = {
        "static": (),
        "headwise": (torch.randn(2, 6, 2, 4),),
        "lowrank": (torch.randn(2, 6, 3), torch.randn(3, 4, 4)),
    }[mode]
    options = {"static_filter": torch.randn(4, 4), "positions": torch.arange(6)[None]}
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mode, x, dynamic, options), run(mode, x, dynamic, options))
