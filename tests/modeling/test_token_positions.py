"""How far back each token's sequence reaches, against a plain count, for every way of marking boundaries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynconv_hf.kernels import MAX_KERNEL_SIZE
from dynconv_hf.modeling.token_positions import token_positions

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def assert_same_taps(positions, expected):
    """Beyond the largest kernel size, one position is as good as another."""
    assert torch.equal(positions.clamp(max=MAX_KERNEL_SIZE), expected.clamp(max=MAX_KERNEL_SIZE).to(torch.int32))


def restarting(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@given(lengths)
def test_ways_to_mark_documents_agree(lengths):
    tokens = sum(lengths)
    expected = restarting(lengths)
    # The first document of a row may go on from the one before: only the state knows.
    unknown = expected + MAX_KERNEL_SIZE * (torch.arange(tokens) < lengths[0])
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    assert_same_taps(token_positions((1, tokens), position_ids=expected), expected)
    assert_same_taps(token_positions((1, tokens), cu_seq_lens_q=cumulative(lengths)), expected)
    assert_same_taps(token_positions((1, tokens), seq_idx=documents.to(torch.int32)), unknown)
    every = {"position_ids": expected, "cu_seq_lens_q": cumulative(lengths), "seq_idx": documents}
    assert_same_taps(token_positions((1, tokens), **every), expected)


@given(lengths, st.integers(1, 3))
def test_cumulative_lengths_run_over_all_rows(lengths, batch):
    lengths = lengths * batch
    tokens = sum(lengths) // batch
    positions = token_positions((batch, tokens), cu_seq_lens_q=cumulative(lengths))
    assert torch.equal(positions, restarting(lengths).view(batch, tokens).to(torch.int32))


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3), st.integers(1, 9))
def test_real_tokens_never_reach_padding(rows, tokens):
    mask = torch.tensor(rows).long()
    positions = token_positions((len(rows), tokens), past_length=9 - tokens, attention_mask=mask)
    for row, kept in enumerate(rows):
        for t in range(9 - tokens, 9):
            if not kept[t]:
                continue
            since_padding = next((back for back in range(t) if not kept[t - 1 - back]), MAX_KERNEL_SIZE)
            assert min(positions[row, t - (9 - tokens)].item(), MAX_KERNEL_SIZE) >= min(since_padding, t)
            if since_padding < MAX_KERNEL_SIZE:
                assert positions[row, t - (9 - tokens)].item() == since_padding


@given(lengths, st.data())
def test_a_chunk_of_restarting_positions_equals_the_whole(lengths, data):
    expected = restarting(lengths)
    tokens = sum(lengths)
    start = data.draw(st.integers(0, tokens - 1))
    stop = data.draw(st.integers(start + 1, tokens))
    chunk = expected[:, start:stop]
    assert_same_taps(token_positions((1, stop - start), past_length=start, position_ids=chunk), chunk)


def test_nothing_marked_is_none():
    assert token_positions((2, 5)) is None


def test_a_mask_may_be_longer_than_what_is_cached():
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0]])
    for past_length in (2, torch.tensor(2)):
        positions = token_positions((1, 2), past_length=past_length, attention_mask=mask)
        assert positions.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must have shape .*got \(2, 4\)"),
        ({"attention_mask": torch.ones(1, 5)}, r"got \(1, 5\)"),
        ({"attention_mask": torch.ones(2, 6), "past_length": 3}, r"the 3 tokens in the cache .* got \(2, 6\)"),
        ({"position_ids": torch.arange(5)}, r"position_ids must have shape \(2, 5\) or \(1, 5\), got \(5,\)"),
        ({"seq_idx": torch.zeros(3, 5)}, r"seq_idx must have shape \(2, 5\) or \(1, 5\), got \(3, 5\)"),
    ],
)
def test_wrong_shapes(options, message):
    with pytest.raises(ValueError, match=message):
        token_positions((2, 5), **options)
