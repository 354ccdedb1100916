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
    if positions is None:
        assert (expected >= MAX_KERNEL_SIZE - 1).all()
        return
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


@given(
    st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(2, MAX_KERNEL_SIZE),
)
def test_each_rows_real_tokens_are_as_if_alone_or_refused(rows, tokens, kernel_size):
    """A convolution over the padded row reads what one over the row's real tokens alone would read."""
    mask = torch.tensor(rows).long()
    past = 9 - tokens
    options = {"past_length": past, "attention_mask": mask, "kernel_size": kernel_size}

    def taps(kept, t):
        real = [s for s in range(t + 1) if kept[s]]
        return real[-kernel_size:]

    new = [(row, t) for row, kept in enumerate(rows) for t in range(past, 9) if kept[t]]
    wanted = {(row, t): taps(rows[row], t) for row, t in new}
    if any(wanted[key] != list(range(key[1] + 1 - len(wanted[key]), key[1] + 1)) for key in new):
        with pytest.raises(ValueError, match="convolutions with kernel_size"):
            token_positions((len(rows), tokens), **options)
        return
    positions = token_positions((len(rows), tokens), **options)
    for row, t in new:
        # None: a token on a CPU, with all the inputs that it reads.
        position = kernel_size - 1 if positions is None else positions[row, t - past].item()
        reach = min(position, kernel_size - 1, t)
        assert list(range(t - reach, t + 1)) == wanted[row, t]


@given(st.lists(st.booleans(), min_size=7, max_size=7), st.integers(1, 7), st.booleans())
def test_a_whole_mask_that_hides_padding_says_what_the_padding_mask_says(kept, tokens, added):
    padding_mask = torch.tensor([kept]).long()
    whole = torch.ones(7, 7, dtype=torch.bool).tril() & padding_mask[:, None, None, :].bool()
    whole = whole[:, :, 7 - tokens :]
    if added:
        whole = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float16).min)
    shape, options = (1, tokens), {"past_length": 7 - tokens, "kernel_size": 4}
    try:
        expected = token_positions(shape, attention_mask=padding_mask, **options)
    except ValueError:
        expected = None
    try:
        found = token_positions(shape, whole_mask=whole, **options)
    except ValueError as error:
        assert expected is None, error
        return
    if expected is not None:
        real = padding_mask[:, 7 - tokens :].bool()
        before = torch.arange(7 - tokens, 7)
        seen = [torch.minimum(positions, before).clamp(max=3)[real] for positions in (found, expected)]
        assert torch.equal(*seen)


def test_branches_in_one_row_are_refused():
    whole = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    whole[..., 3, 2] = False  # token 3 is another answer to token 1, beside token 2
    with pytest.raises(ValueError, match="token 3 of row 0"):
        token_positions((1, 4), whole_mask=whole)


def test_positions_may_jump_where_documents_are_marked_otherwise():
    jumping = torch.tensor([[0, 1, 2, 50, 51, 0, 1]])
    marked = token_positions((1, 7), position_ids=jumping, jumps_begin_documents=False)
    assert marked.clamp(max=3).tolist() == [[0, 1, 2, 3, 3, 0, 1]]
    assert token_positions((1, 7), position_ids=jumping).tolist() == [[0, 1, 2, 0, 1, 0, 1]]


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


def test_a_token_on_a_cpu_asks_only_near_a_boundary():
    for past, padding, is_near in ((3, 0, False), (9, 7, True), (9, 6, False)):
        mask = torch.ones(2, past + 1, dtype=torch.long)
        mask[0, :padding] = 0
        positions = token_positions((2, 1), past_length=past, attention_mask=mask, kernel_size=4)
        assert (positions is not None) == is_near
