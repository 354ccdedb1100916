"""A cache of keys, values and the last inputs of convolutions: whatever is done to it, logits are as without it."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from .models import moved_model

BATCH, PROMPT, LENGTH = 3, 6, 10
# The others have keys and values alone.
LAYERS = 3


@pytest.fixture(scope="module")
def model():
    return moved_model(conv_layers=list(range(LAYERS))).eval()


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(3, model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def filled(model, ids, **options):
    cache = DynamicCache(config=model.config)
    model(ids[:, :PROMPT], past_key_values=cache, **options)
    return cache


def states_of(cache):
    return [state for layer in cache.layers[:LAYERS] for state in layer.conv_states.values()]


def assert_goes_on(model, ids, cache, start=PROMPT):
    logits = model(ids[:, start:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, start:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[2, 0, 1], [2, 0], [1]])
def test_selected_rows(model, ids, rows):
    cache = filled(model, ids)
    cache.batch_select_indices(torch.tensor(rows))
    assert_goes_on(model, ids[rows], cache)


@torch.no_grad()
def test_repeated_rows(model, ids):
    cache = filled(model, ids)
    cache.batch_repeat_interleave(2)
    assert_goes_on(model, ids.repeat_interleave(2, dim=0), cache)


@torch.no_grad()
def test_a_cache_that_the_model_made_itself(model, ids):
    cache, rows = model(ids[:, :PROMPT]).past_key_values, torch.tensor([2, 0, 1])
    cache.batch_select_indices(rows)
    assert_goes_on(model, ids[rows], cache)


@torch.no_grad()
@pytest.mark.parametrize("replica", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies(model, ids, replica):
    cache = filled(model, ids)
    other = replica(cache)
    assert_goes_on(model, ids, cache)
    assert_goes_on(model, ids, other)


@torch.no_grad()
def test_another_batch_size_and_dtype_after_a_reset(ids):
    # Convolutions in every layer: in transformers 5.17, a reset of a layer without them keeps the length.
    model = moved_model().eval()
    cache = filled(model, ids)
    cache.reset()
    assert_goes_on(model, ids[:2], cache, start=0)
    cache.reset()
    half = copy.deepcopy(model).to(torch.bfloat16)
    half(ids, past_key_values=cache)
    assert {state.dtype for layer in cache.layers for state in layer.conv_states.values()} == {torch.bfloat16}


def test_a_cache_outlives_inference_mode(model, ids):
    with torch.inference_mode():
        cache = filled(model, ids)
    with torch.no_grad():
        assert_goes_on(model, ids, cache)


@torch.no_grad()
@pytest.mark.parametrize("first", [-1, -3])
def test_a_rollback_is_exact_or_refused(model, ids, first):
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :8], past_key_values=cache)
    cache.crop(first)
    before = [state.clone() for state in states_of(cache)]
    with pytest.raises(ValueError, match="convolutions: of the 3 inputs before the removed tokens, 2 are"):
        cache.crop(-1)
    after = states_of(cache)
    assert all(map(torch.equal, before, after))
    assert cache.get_seq_length() == 8 + first
    assert_goes_on(model, ids, cache, start=8 + first)


@torch.no_grad()
def test_after_a_crop_of_everything_the_rows_may_be_others(ids):
    # Convolutions in every layer: those without are transformers' own, whose rows stay.
    model = moved_model().eval()
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.crop(-LENGTH)
    cache.batch_repeat_interleave(2)
    assert_goes_on(model, ids.repeat_interleave(2, dim=0), cache, start=0)
    # The past is recorded as before.
    cache.crop(-LENGTH)
    cache.crop(0)
    assert_goes_on(model, ids, cache, start=0)


@torch.no_grad()
def test_a_crop_refused_in_the_middle_is_noticed(ids):
    """Layers without convolutions, before those with them, have let go of their tokens by then."""
    model = moved_model(conv_layers=[1]).eval()
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :8], past_key_values=cache)
    cache.crop(-1)
    with pytest.raises(ValueError, match="are still recorded"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="holds 6 tokens in layer 0, but 7 in layer 1"):
        model(ids[:, 6:], past_key_values=cache)


@torch.no_grad()
def test_a_static_cache_refuses_what_it_cannot_do(model, ids):
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(ids[:, :PROMPT], past_key_values=cache)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="batch_repeat_interleave"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="batch_select_indices"):
        cache.batch_select_indices(torch.tensor([0]))
    assert_goes_on(model, ids, cache)


@torch.no_grad()
def test_a_static_cache_begins_anew_after_a_reset(model, ids):
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(ids[:, :PROMPT], past_key_values=cache)
    cache.reset()
    assert_goes_on(model, ids, cache, start=0)


@torch.no_grad()
@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=LENGTH)])
def test_reordered_rows(model, ids, make):
    cache, beams = make(config=model.config), torch.tensor([2, 0, 0])
    model(ids[:, :PROMPT], past_key_values=cache)
    cache.reorder_cache(beams)
    assert_goes_on(model, ids[beams], cache)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_would_forget_the_states(model, ids, strict):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=LENGTH)

        def forward(self, ids):
            return self.model(ids, past_key_values=self.cache).logits

    # Dynamo, which strict=True traces with, wraps the error in its own.
    with pytest.raises(Exception, match="states of the convolutions from call to call"):
        torch.export.export(Step(), (ids[:, :1],), strict=strict)


@torch.no_grad()
def test_states_that_do_not_fit_are_refused_before_anything_is_written(model, ids):
    cache = filled(model, ids)
    with pytest.raises(ValueError, match="states of 3 rows in layer 0, but the input has 2 rows"):
        model(ids[:2, PROMPT:], past_key_values=cache)
    assert_goes_on(model, ids, cache)

    cache = filled(model, ids)
    cache.layers[1].conv_states[0] = cache.layers[1].conv_states[0][..., -1:]
    with pytest.raises(ValueError, match="the last 1 inputs of a convolution in layer 1"):
        model(ids[:, PROMPT:], past_key_values=cache)

    keys_and_values = [(layer.keys, layer.values) for layer in filled(model, ids).layers]
    cache = DynamicCache(keys_and_values, config=model.config)
    with pytest.raises(ValueError, match="no states of the convolutions"):
        model(ids[:, PROMPT:], past_key_values=cache)


def test_after_assisted_generation_states_are_as_small_as_before(model, ids):
    cache = DynamicCache(config=model.config)
    prompt = ids[:1].repeat(1, 2)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    model.generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
    assert {state.shape[-1] for state in states_of(cache)} == {3}
