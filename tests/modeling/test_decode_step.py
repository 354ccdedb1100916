"""Decoding with one launch for a token's convolutions: the same tokens, the same cache, and only where it serves."""

import os
import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache, StaticCache

from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM
from dynconv_hf.modeling import decode_step as fused

from .models import move_convs, random_ids
from .test_config import SMALL

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or Triton's interpreter",
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}
STATIC = {"cache_implementation": "static", "disable_compile": True}
LAYERS = 2
# How many launches a token of a layer takes with convolutions on all linear layers: Q, K, V; O; gate, up; down.
ALL_LINEAR = 4


def small_model(**kwargs):
    torch.manual_seed(0)
    fields = {**SMALL, "num_hidden_layers": LAYERS, **kwargs}
    return move_convs(DynConvLlamaForCausalLM(DynConvLlamaConfig(**fields))).eval().to(DEVICE)


def ids(batch, tokens, seed=0):
    return random_ids(batch, tokens, seed).to(DEVICE)


@pytest.fixture
def steps(monkeypatch):
    """The fused steps, one entry each: how many convolutions, and whether RoPE is in it."""
    steps, whole, select = [], fused.decode_step, fused.select_implementation

    def select_triton(x, impl):
        # The interpreter for these steps alone: whole sequences would take it minutes.
        return select(x, "triton" if "DYNCONV_IMPL" not in os.environ else impl)

    monkeypatch.setattr(fused, "select_implementation", select_triton)

    def count(hidden_states, xs, *others):
        steps.append((len(xs), others[5] is not None))
        return whole(hidden_states, xs, *others)

    monkeypatch.setattr(fused, "decode_step", count)
    return steps


def generate(model, tokens, plain=False, **options):
    model.config.conv_fused = not plain
    return model.generate(tokens, **{**GREEDY, **options})


def assert_same_tokens(model, tokens, steps, expected_steps, **options):
    found = generate(model, tokens, **options)
    assert len(steps) == expected_steps
    assert torch.equal(found, generate(model, tokens, plain=True, **options))
    assert len(steps) == expected_steps


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("fields", "launches", "group"),
    [
        ({}, LAYERS, (3, True)),
        ({"conv_targets": "all-linear"}, LAYERS * ALL_LINEAR, (3, True)),
        ({"conv_targets": ["v_proj", "q_proj"]}, LAYERS, (2, False)),
        ({"conv_targets": ["q_proj", "k_proj"]}, LAYERS, (2, True)),
        ({"conv_targets": ["up_proj"]}, LAYERS, (1, False)),
        ({"conv_layers": [1]}, 1, (3, True)),
        ({"conv_kernel_size": 2, "conv_static": False, "conv_rank": 3}, LAYERS, (3, True)),
        ({"conv_kernel_size": 8, "conv_residual": False, "conv_rank": 17}, LAYERS, (3, True)),
        ({"head_dim": 6}, LAYERS, (3, True)),
    ],
    ids=str,
)
def test_the_same_tokens(fields, launches, group, cache, steps):
    # The first new token comes from the prompt.
    assert_same_tokens(small_model(**fields), ids(2, 7), steps, launches * (GREEDY["max_new_tokens"] - 1), **cache)
    assert steps[0] == group


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
def test_left_padding_changes_nothing(cache, steps):
    model, rows = small_model(), [ids(1, n, seed=n) for n in (3, 9, 1)]
    width = 10
    tokens, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, prompt in enumerate(rows):
        tokens[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    found = generate(model, tokens.to(DEVICE), attention_mask=mask.to(DEVICE), **cache)
    assert steps
    for row, prompt in enumerate(rows):
        alone = generate(model, prompt, plain=True, **cache)
        assert torch.equal(found[row, width:], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
def test_beams(cache, steps):
    launches = LAYERS * (GREEDY["max_new_tokens"] - 1)
    assert_same_tokens(small_model(), ids(2, 6), steps, launches, num_beams=3, num_return_sequences=2, **cache)


def test_a_past_that_is_recorded_is_left_to_the_cache(steps):
    assert_same_tokens(small_model(), ids(1, 7), steps, 0, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_cache_is_as_the_convolutions_leave_it(kind, steps):
    """Chunks of a prompt, single tokens, and a chunk again; the states stay where they are."""
    model, tokens, caches = small_model(conv_targets="all-linear"), ids(2, 14), []
    for conv_fused in (True, False):
        model.config.conv_fused = conv_fused
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=16)
        else:
            cache = DynamicCache(config=model.config)
        places = set()
        with torch.no_grad():
            chunks = []
            for chunk in tokens.split([1, 3, 1, 1, 1, 2, 1, 4], dim=1):
                chunks.append(model(chunk, past_key_values=cache).logits)
                places.add(tuple(s.data_ptr() for layer in cache.layers for s in layer.conv_states.values()))
        assert len(places) == 1
        caches.append((cache, torch.cat(chunks, dim=1)))
    assert len(steps) == 4 * LAYERS * ALL_LINEAR
    (cache, logits), (plain_cache, plain_logits) = caches
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-4)
    for layer, plain in zip(cache.layers, plain_cache.layers, strict=True):
        assert layer.has_previous_state == plain.has_previous_state
        for index, state in plain.conv_states.items():
            torch.testing.assert_close(layer.conv_states[index], state, rtol=1e-4, atol=1e-4)


def logits_after_a_prompt(model, autocast=False, grad=False):
    cache = DynamicCache(config=model.config)
    with torch.set_grad_enabled(grad), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        model(ids(1, 5), past_key_values=cache)
        return model(ids(1, 1), past_key_values=cache).logits


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"conv_fused": False}, {}),
        ({"conv_mode": "static"}, {}),
        ({"conv_mode": "headwise", "conv_head_size": 4}, {}),
        ({"conv_kernel_size": 1}, {}),
        ({}, {"grad": True}),
        ({}, {"autocast": True}),
    ],
    ids=str,
)
def test_not_fused(fields, options, steps):
    logits_after_a_prompt(small_model(**fields), **options)
    assert steps == []


def test_the_environment_chooses(steps, monkeypatch):
    monkeypatch.setenv("DYNCONV_IMPL", "reference")
    expected = logits_after_a_prompt(small_model())
    assert steps == []
    monkeypatch.setenv("DYNCONV_IMPL", "triton")
    torch.testing.assert_close(logits_after_a_prompt(small_model()), expected, rtol=1e-4, atol=1e-4)
    assert len(steps) == LAYERS


def test_a_convolution_that_somebody_listens_to_is_called(steps):
    model, seen = small_model(), []
    conv = model.model.layers[0].self_attn.v_conv
    conv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    logits = logits_after_a_prompt(model)
    assert seen[1] == (1, 1, conv.channels) and len(steps) == LAYERS - 1
    model.config.conv_fused = False
    torch.testing.assert_close(logits, logits_after_a_prompt(model), rtol=1e-4, atol=1e-4)


def test_convolutions_of_different_kinds_are_called(steps):
    model = small_model()
    for layer in model.model.layers:
        conv = layer.self_attn.k_conv
        conv.basis = nn.Parameter(conv.basis.to(torch.bfloat16))
    logits_after_a_prompt(model)
    assert steps == []


def test_compiled(steps):
    torch.compiler.reset()
    model = small_model()
    tokens = ids(2, 12)
    cache, plain_cache = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        model(tokens[:, :7], past_key_values=cache)
        found = [compiled(token, past_key_values=cache).logits for token in tokens[:, 7:].split(1, dim=1)]
        model.config.conv_fused = False
        model(tokens[:, :7], past_key_values=plain_cache)
        expected = [model(token, past_key_values=plain_cache).logits for token in tokens[:, 7:].split(1, dim=1)]
    assert steps
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_compiled_layers_share_positions_and_angles(steps):
    """Once they were copied for each layer: a launch of its own, between launches of a few microseconds."""
    torch.compiler.reset()
    model = small_model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    tokens = ids(2, 8)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        model(tokens[:, :7], past_key_values=cache)
        compiled = torch.compile(model, fullgraph=True)
        _, (code, *_) = run_and_get_code(compiled, tokens[:, 7:], past_key_values=cache)
    # positions, cos, sin, head_dim: what stands between the list of states and the list of flags.
    shared = re.findall(r"decode_step\.default\(.*\], (\w+, \w+, \w+, \d+), \[", code)
    assert len(shared) == LAYERS
    assert len(set(shared)) == 1
