"""With convolutions far from the identity, every way of running the decoder gives what full forward passes give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from dynconv_hf import retrofit

from .models import QKV, STORIES, VARIANTS, moved_model, prompt_ids, random_ids

NEW_TOKENS = 200
GREEDY = {"do_sample": False, "eos_token_id": None}
FEW_TOKENS = 50


def variant_name(variant):
    mode, targets = variant
    return f"{mode}-{'qkv' if targets == QKV else 'all'}"


@pytest.fixture(scope="module", params=VARIANTS, ids=variant_name)
def model(request):
    return moved_model(*request.param)


@pytest.fixture(scope="module")
def greedy(model):
    """200 greedy tokens after two prompts, with transformers' default cache."""
    return model.generate(random_ids(2, 7), **GREEDY, max_new_tokens=NEW_TOKENS)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_greedy_equals_the_argmax_of_full_forward_passes(model, greedy):
    # One causal forward pass over the result holds the full forward pass of every prefix.
    with torch.no_grad():
        argmax = model(greedy, use_cache=False).logits.argmax(-1)
    assert torch.equal(argmax[:, 6:-1], greedy[:, 7:])
    for tokens in (7, 8, 9, 10, 11, 50, 206):
        with torch.no_grad():
            last = model(greedy[:, :tokens], use_cache=False).logits[:, -1]
        assert torch.equal(last.argmax(-1), greedy[:, tokens])


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_greedy_by_other_ways(model, greedy, options):
    out = model.generate(random_ids(2, 7), **GREEDY, **options, max_new_tokens=FEW_TOKENS)
    assert torch.equal(out, greedy[:, : 7 + FEW_TOKENS])


def test_rollback_with_prompt_lookup(model, greedy):
    options = {**GREEDY, "max_new_tokens": NEW_TOKENS, "prompt_lookup_num_tokens": 4}
    assert torch.equal(model.generate(random_ids(2, 7)[:1], **options), greedy[:1])


def test_rollback_with_a_draft_model(model, greedy):
    options = {**GREEDY, "max_new_tokens": FEW_TOKENS, "assistant_model": retrofit(STORIES)}
    assert torch.equal(model.generate(random_ids(2, 7)[:1], **options), greedy[:1, : 7 + FEW_TOKENS])


def test_as_a_draft_model(model):
    target, ids = retrofit(STORIES), prompt_ids()
    options = {**GREEDY, "max_new_tokens": FEW_TOKENS}
    expected = target.generate(ids, **options)
    assert torch.equal(target.generate(ids, **options, assistant_model=model), expected)


def test_rollback_of_a_prompt_shorter_than_the_kernel(model):
    ids = random_ids(1, 1)
    options = {**GREEDY, "max_new_tokens": 30}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(model.generate(ids, **options, assistant_model=retrofit(STORIES)), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_equal_beams_without_a_cache(model, cache):
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": 4, "num_return_sequences": 2}
    expected = model.generate(random_ids(2, 6), **options, use_cache=False)
    more = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(random_ids(2, 6), **options, **more), expected)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.sampled_from(["dynamic", "static"]))
def test_any_cut_of_the_prompt_gives_the_same_logits(model, lengths, kind):
    ids = random_ids(2, sum(lengths))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 3)
        else:
            cache = DynamicCache(config=model.config)
        chunks = [model(chunk, past_key_values=cache).logits for chunk in ids.split(lengths, dim=1)]
    assert_close(torch.cat(chunks, dim=1), expected)


def test_continuing_from_a_given_cache(model, greedy):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(greedy[:, :90], past_key_values=cache)
    options = {**GREEDY, "max_new_tokens": FEW_TOKENS}
    out = model.generate(greedy[:, :100], past_key_values=cache, **options)
    assert torch.equal(out, greedy[:, : 100 + FEW_TOKENS])


def test_a_used_cache_can_be_reset(model, greedy):
    cache = StaticCache(config=model.config, max_cache_len=64)
    options = {**GREEDY, "max_new_tokens": FEW_TOKENS, "disable_compile": True}
    for _ in range(2):
        out = model.generate(random_ids(2, 7), past_key_values=cache, **options)
        assert torch.equal(out, greedy[:, : 7 + FEW_TOKENS])
        cache.reset()


def test_cropping_a_cache_by_hand(model):
    ids = random_ids(2, 20)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 8:]
        model(ids[:, :5], past_key_values=cache)
        cache.crop(0)
        model(torch.cat([ids[:, 5:8], random_ids(2, 4, seed=1)], dim=1), past_key_values=cache)
        cache.crop(-4)
        assert_close(model(ids[:, 8:], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_left_padding_changes_nothing(model, batch, cache_implementation):
    lengths = [3, 9, 1, 5, 2][:batch]
    rows = [random_ids(1, length, seed=length) for length in lengths]
    width = 12
    ids, mask = torch.zeros(batch, width, dtype=torch.long), torch.zeros(batch, width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - tokens.shape[1] :] = tokens
        mask[row, width - tokens.shape[1] :] = 1
    options = {**GREEDY, "max_new_tokens": 30}
    if cache_implementation == "static":
        options.update(cache_implementation="static", disable_compile=True)
    out = model.generate(ids, attention_mask=mask, **options)
    for row, tokens in enumerate(rows):
        alone = model.generate(tokens, **options)
        assert torch.equal(out[row, width:], alone[0, tokens.shape[1] :])


def test_kernel_size_one_needs_no_state():
    model = moved_model(conv_kernel_size=1)
    assert set(model.config.layer_types) == {"full_attention"}
    options = {**GREEDY, "max_new_tokens": FEW_TOKENS}
    out = model.generate(random_ids(2, 7), **options)
    argmax = model(out, use_cache=False).logits.argmax(-1)
    assert torch.equal(argmax[:, 6:-1], out[:, 7:])
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(random_ids(2, 7), **options, **static), out)


def test_convolutions_in_some_layers_only():
    model = moved_model(conv_layers=[1, 3])
    assert model.config.layer_types == ["full_attention", "hybrid", "full_attention", "hybrid", "full_attention"]
    options = {**GREEDY, "max_new_tokens": FEW_TOKENS}
    out = model.generate(random_ids(2, 7), **options)
    assert torch.equal(model(out, use_cache=False).logits.argmax(-1)[:, 6:-1], out[:, 7:])
    for more in ({"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(random_ids(2, 7)[:1], **options, **more), out[:1])


def test_drafts_by_early_exit():
    model, options = moved_model(), {**GREEDY, "max_new_tokens": 5}
    expected = model.generate(random_ids(1, 7), **options)
    assert torch.equal(model.generate(random_ids(1, 7), **options, assistant_early_exit=2), expected)


def test_inputs_embeds(model):
    ids = random_ids(2, 7)
    embeds = model.get_input_embeddings()(ids)
    options = {**GREEDY, "max_new_tokens": 20}
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), model.generate(ids, **options)[:, 7:])


def test_a_cache_without_places_for_states_is_an_error(model):
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(random_ids(1, 3), past_key_values=DynamicCache())


def test_continuous_batching_is_an_error(model):
    with pytest.raises(ValueError, match=r"generate_batch.*conv_kernel_size=4; use generate\(\)"):
        model.generate_batch([[5, 6, 7], [8, 9]])
