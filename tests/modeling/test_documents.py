"""The convolution sees only real tokens of its own document: padded and packed rows equal their documents alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from .models import VARIANTS, moved_model, random_ids

LENGTHS = (5, 1, 2, 9, 3)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def model(request):
    return moved_model(*request.param)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def attention_model(request, model):
    model.set_attn_implementation(request.param)
    yield model
    model.set_attn_implementation("sdpa")


def documents(lengths=LENGTHS):
    return [random_ids(1, length, seed=length) for length in lengths]


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def padded(rows, side):
    width = max(row.shape[1] for row in rows) + 2
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [1, 5])
def test_padded_rows_equal_unpadded_ones(attention_model, side, batch):
    rows = documents()[:batch]
    ids, mask = padded(rows, side)
    # As generate() does: rotary positions count real tokens.
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    for more in ({"position_ids": position_ids}, {}):
        out = logits(attention_model, ids, attention_mask=mask, **more)
        for index, row in enumerate(rows):
            actual, expected = out[index, mask[index] == 1], logits(attention_model, row)[0]
            # Without positions, rotary angles start at the padding: equal but for their rounding.
            tolerance = 1e-5 if more else 1e-3
            torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_flex_attention():
    """One model and one pass of each kind: every shape is compiled anew."""
    model = moved_model(attn_implementation="flex_attention")
    rows = documents((5, 9))
    alone = moved_model()
    ids, mask = padded(rows, "left")
    out = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    packed = logits(model, torch.cat(rows, dim=1), position_ids=torch.tensor([[*range(5), *range(9)]]))
    for index, row in enumerate(rows):
        assert_close(out[index, mask[index] == 1], logits(alone, row)[0])
        assert_close(packed.split((5, 9), dim=1)[index], logits(alone, row))


@pytest.mark.parametrize("content", [7, 400])
def test_what_padding_holds_does_not_matter(model, content):
    ids, mask = padded(documents(), "left")
    changed = torch.where(mask == 1, ids, content)
    out, changed_out = logits(model, ids, attention_mask=mask), logits(model, changed, attention_mask=mask)
    assert torch.equal(out[mask == 1], changed_out[mask == 1])


def test_packed_rows_equal_their_documents(attention_model):
    rows = documents()
    batch = DataCollatorWithFlattening()([{"input_ids": row[0].tolist()} for row in rows])
    batch.pop("labels")
    out = logits(attention_model, batch.pop("input_ids"), **batch)
    for packed, row in zip(out.split(LENGTHS, dim=1), rows, strict=True):
        assert_close(packed, logits(attention_model, row))


@pytest.mark.parametrize("mark", ["position_ids", "flash_attn_kwargs", "seq_idx"])
def test_each_way_to_mark_boundaries(model, mark):
    """The first convolution alone: eager and sdpa attention know only one of these marks."""
    rows = documents()
    ways = {f"return_{way}": way == mark for way in ("position_ids", "flash_attn_kwargs", "seq_idx")}
    batch = DataCollatorWithFlattening(**ways)([{"input_ids": row[0].tolist()} for row in rows])
    marks = {key: value for key, value in batch.items() if key not in ("labels", "input_ids")}
    assert marks and ("position_ids" in marks) == (mark == "position_ids")
    seen = _first_conv_outputs(model, batch["input_ids"], **marks)
    for packed, row in zip(seen.split(LENGTHS, dim=1), rows, strict=True):
        assert_close(packed, _first_conv_outputs(model, row))


@settings(max_examples=20)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_any_packing(model, lengths):
    rows = [random_ids(1, length, seed=index) for index, length in enumerate(lengths)]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    out = logits(model, torch.cat(rows, dim=1), position_ids=position_ids)
    for packed, row in zip(out.split(lengths, dim=1), rows, strict=True):
        assert_close(packed, logits(model, row))


def test_packed_batches_of_several_rows(model):
    rows = [documents((4, 6)), documents((7, 3))]
    ids = torch.cat([torch.cat(row, dim=1) for row in rows])
    position_ids = torch.tensor([[*range(4), *range(6)], [*range(7), *range(3)]])
    out = logits(model, ids, position_ids=position_ids)
    assert_close(out[:1, 4:], logits(model, rows[0][1]))
    assert_close(out[1:, 7:], logits(model, rows[1][1]))


def test_gradients_do_not_cross_documents(model):
    rows = documents((4, 6))
    embeds = model.get_input_embeddings()(torch.cat(rows, dim=1)).detach().requires_grad_()
    position_ids = torch.tensor([[*range(4), *range(6)]])
    model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False).logits[:, 4:].sum().backward()
    assert embeds.grad[:, :4].abs().max() == 0
    assert embeds.grad[:, 4:].abs().max() > 0


@torch.no_grad()
def _first_conv_outputs(model, ids, **marks):
    seen = []
    handle = model.model.layers[0].self_attn.q_conv.register_forward_hook(lambda *args: seen.append(args[-1]))
    model(ids, use_cache=False, **marks)
    handle.remove()
    return seen[0]
