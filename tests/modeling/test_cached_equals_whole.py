"""Whatever is done to a cache between the chunks of a text, logits and texts are those of the whole text without one.

Models, cuts, padding and the methods called are random; each row, alone and without padding, says what is right.
"""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM
from dynconv_hf.modeling.configuration_dynconv_llama import CONV_TARGETS

from .models import move_convs

VOCABULARY = 40
LAYERS = 2
LONGEST = 40

targets = st.one_of(
    st.just("all-linear"), st.just(["q_proj", "k_proj", "v_proj"]), st.lists(st.sampled_from(CONV_TARGETS), min_size=1)
)


configs = st.fixed_dictionaries(
    {
        "num_key_value_heads": st.sampled_from([1, 2]),
        "conv_mode": st.sampled_from(["lowrank", "headwise", "static"]),
        "conv_targets": targets,
        "conv_kernel_size": st.sampled_from([4, 3, 2, 1]),
        "conv_layers": st.none() | st.lists(st.integers(0, LAYERS - 1), min_size=1, unique=True),
        "conv_fused": st.booleans(),
    }
)


def small_model(options):
    """Far from the identity, and in float64, where the order of a sum decides no token."""
    config = DynConvLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        conv_rank=3,
        conv_head_size=4,
        # Keys and values that matter: small ones make for attention that looks everywhere alike.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **options,
    )
    torch.manual_seed(0)
    return move_convs(DynConvLlamaForCausalLM(config)).double().eval()


calls = st.one_of(
    st.tuples(st.just("crop"), st.integers(0, 6)),
    st.tuples(st.sampled_from(["reorder", "select"]), st.lists(st.integers(0, 2), min_size=2, max_size=3)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["reset", "copy", "pickle"]), st.none()),
)
# The tokens of the first chunk, then a method and the tokens of the next chunk, and so on.
steps = st.tuples(
    st.integers(1, 6), st.lists(st.tuples(calls, st.sampled_from([1, 4, 0, 2, 6])), min_size=3, max_size=6)
)


class Text:
    """Rows of tokens, padded on the left, and what a cache has read of them."""

    def __init__(self, model, cache, padding, positions, seed):
        self.model, self.cache, self.positions = model, cache, positions
        self.generator = torch.Generator().manual_seed(seed)
        self.padding = torch.tensor(padding)
        self.ids = torch.zeros(len(padding), 0, dtype=torch.long)
        self.is_static = isinstance(cache, StaticCache)
        # Where all layers are ours; transformers' own keep the rows of what was cropped or, in 5.17, reset.
        self.is_whole = "full_attention" not in model.config.layer_types
        self.recorded = 0

    def read(self, tokens):
        if not tokens or self.ids.shape[1] + tokens > LONGEST:
            return
        new = torch.randint(VOCABULARY, (len(self.ids), tokens), generator=self.generator)
        past, self.ids = self.ids.shape[1], torch.cat([self.ids, new], dim=1)
        self.recorded += tokens
        mask = (torch.arange(self.ids.shape[1]) >= self.padding[:, None]).long()
        options = {"attention_mask": mask} if self.padding.any() else {}
        if self.positions:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        logits = self.model(new, past_key_values=self.cache, **options).logits
        # Each row without its padding; what comes to stand behind it is nothing that it could see.
        unpadded = torch.stack([row.roll(-pad) for row, pad in zip(self.ids, self.padding.tolist(), strict=True)])
        whole = self.model(unpadded, use_cache=False).logits
        for row, pad in enumerate(self.padding.tolist()):
            expected = whole[row, max(past - pad, 0) : max(self.ids.shape[1] - pad, 0)]
            torch.testing.assert_close(logits[row, max(pad - past, 0) :], expected, atol=1e-5, rtol=1e-5)

    def crop(self, tokens):
        width = self.model.config.conv_kernel_size - 1
        length = self.ids.shape[1] - tokens
        if self.is_static or length < 0 or self.recorded - tokens < min(width, length):
            return
        self.cache.crop(-tokens)
        self.ids = self.ids[:, :length]
        self.recorded = min(self.recorded - tokens, width)

    def take(self, rows):
        self.ids, self.padding = self.ids[rows], self.padding[rows]

    def reorder(self, rows):
        rows = torch.tensor([rows[idx % len(rows)] % len(self.ids) for idx in range(len(self.ids))])
        self.cache.reorder_cache(rows)
        self.take(rows)

    def select(self, rows):
        if self.is_static or not (self.is_whole or self.ids.shape[1]):
            return
        rows = torch.tensor([row % len(self.ids) for row in rows])
        self.cache.batch_select_indices(rows)
        self.take(rows)

    def repeat(self, repeats):
        if self.is_static or len(self.ids) * repeats > 6 or not (self.is_whole or self.ids.shape[1]):
            return
        self.cache.batch_repeat_interleave(repeats)
        self.take(torch.arange(len(self.ids)).repeat_interleave(repeats))

    def reset(self, _):
        if not self.is_whole:
            return
        self.cache.reset()
        self.ids, self.recorded = self.ids[:, :0], 0

    def copy(self, _):
        self.replace(copy.deepcopy(self.cache))

    def pickle(self, _):
        self.replace(pickle.loads(pickle.dumps(self.cache)))

    def replace(self, replica):
        """What the original goes on to read is not for the replica to see."""
        if self.ids.shape[1] < LONGEST:
            self.model(torch.zeros(len(self.ids), 1, dtype=torch.long), past_key_values=self.cache)
        self.cache = replica


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@settings(max_examples=20, derandomize=True)
@given(
    config=configs,
    padding=st.just([0, 0]) | st.lists(st.integers(0, 5), min_size=2, max_size=3),
    positions=st.booleans(),
    steps=steps,
    seed=st.integers(0, 9),
)
def test_logits(kind, config, padding, positions, steps, seed):
    model = small_model(config)
    if kind is DynamicCache:
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
    else:
        cache = StaticCache(config=model.config, max_cache_len=LONGEST)
    text = Text(model, cache, padding, positions, seed)
    first, others = steps
    text.read(first)
    for (method, argument), tokens in others:
        getattr(text, method)(argument)
        text.read(tokens)
    text.read(2)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "beams of samples": {"num_beams": 2, "do_sample": True},
}


@settings(max_examples=12, derandomize=True)
@given(
    config=configs,
    padding=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    tokens=st.integers(1, 5),
    way=st.sampled_from(sorted(WAYS)),
    options=st.sampled_from(
        [{}, {"prefill_chunk_size": 2}, {"cache_implementation": "static", "disable_compile": True}]
    ),
    seed=st.integers(0, 9),
)
def test_texts(config, padding, tokens, way, options, seed):
    model = small_model(config)
    ids, mask = prompts(padding, tokens, seed)

    def generate(**more):
        torch.manual_seed(seed)
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, **{"do_sample": False, **WAYS[way], **more})

    assert torch.equal(generate(**options), generate(use_cache=False))


@settings(max_examples=6, derandomize=True)
@given(
    config=configs,
    drafts=configs,
    tokens=st.integers(1, 5),
    new_tokens=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_texts_with_rollbacks(config, drafts, tokens, new_tokens, seed):
    model, assistant = small_model(config), small_model(drafts)
    ids, mask = prompts([0], tokens, seed)
    # Something for the lookup of the prompt to find.
    ids, mask = ids.repeat(1, 2), mask.repeat(1, 2)
    options = {"attention_mask": mask, "max_new_tokens": new_tokens, "do_sample": False}
    greedy = model.generate(ids, **options, use_cache=False)
    for way in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        cache = DynamicCache(config=model.config)
        assert torch.equal(model.generate(ids, **options, **way, past_key_values=cache), greedy)
        # What a rollback leaves in the cache is what the next text goes on from.
        longer = torch.cat([greedy, ids], dim=1)
        more = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 4, "do_sample": False}
        expected = model.generate(longer, **more, use_cache=False)
        assert torch.equal(model.generate(longer, **more, past_key_values=cache), expected)


def prompts(padding, tokens, seed):
    """Rows of at least `tokens` tokens, padded on the left, and their mask."""
    width = max(padding) + tokens
    ids = torch.randint(VOCABULARY, (len(padding), width), generator=torch.Generator().manual_seed(seed))
    return ids, (torch.arange(width) >= torch.tensor(padding)[:, None]).long()
