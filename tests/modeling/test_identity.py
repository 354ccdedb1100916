"""A retrofitted model starts as its base: the same logits to the last bit, the same text however it is generated."""

import pytest
import torch
from transformers import AutoTokenizer

from dynconv_hf import retrofit

from .models import STORIES, VARIANTS, base_model, prompt_ids

NEW_TOKENS = 200


@pytest.fixture(scope="module")
def base():
    return base_model()


@pytest.fixture(scope="module", params=["qkv", "all-linear"])
def model(request):
    return retrofit(STORIES, **({} if request.param == "qkv" else {"conv_targets": "all-linear"}))


@pytest.mark.parametrize(
    ("mode", "targets", "attention"),
    [(*variant, attention) for variant in VARIANTS for attention in ("eager", "sdpa")]
    + [("lowrank", "all-linear", "flex_attention")],
)
def test_logits_equal_to_the_last_bit(mode, targets, attention):
    base = base_model(attn_implementation=attention)
    model = retrofit(STORIES, conv_mode=mode, conv_targets=targets, conv_head_size=4, attn_implementation=attention)
    ids = prompt_ids()
    with torch.no_grad():
        assert torch.equal(base(ids).logits, model(ids).logits)


def test_bfloat16_logits_equal_to_the_last_bit():
    base, model = base_model(dtype=torch.bfloat16), retrofit(STORIES, dtype=torch.bfloat16)
    ids = prompt_ids()
    assert model(ids).logits.dtype == torch.bfloat16
    assert torch.equal(base(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3, "num_return_sequences": 3},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_the_same_tokens(base, model, options):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    expected = base.generate(prompt_ids(), **options)
    assert expected.shape[-1] > 50
    assert torch.equal(model.generate(prompt_ids(), **options), expected)


def test_the_same_samples(base, model):
    def sample(a_model):
        torch.manual_seed(0)
        return a_model.generate(prompt_ids(), do_sample=True, max_new_tokens=NEW_TOKENS, num_return_sequences=3)

    assert torch.equal(sample(model), sample(base))


def test_the_same_text_for_each_row_of_a_left_padded_batch(base, model):
    tokenizer = AutoTokenizer.from_pretrained(STORIES, padding_side="left")
    prompts = ["Once", "Lily and her dog went to the", "One day, a boy named Tim saw a big red", "The", "She was so"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    rows = model.generate(**batch, **options)
    assert torch.equal(rows, base.generate(**batch, **options))
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    for prompt, text in zip(prompts, texts, strict=True):
        alone = model.generate(prompt_ids(prompt), **options)
        assert tokenizer.decode(alone[0], skip_special_tokens=True) == text
