"""conv_recompute: the same gradients to the last bit, from less memory."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks

from .models import QKV, VARIANTS, random_ids
from .test_fused import loss_and_gradients, small_model

CASES = [
    *({"conv_mode": mode, "conv_targets": targets} for mode, targets in VARIANTS),
    {"conv_targets": ["q_proj", "down_proj"], "conv_layers": [1]},
    {"conv_targets": "all-linear", "conv_fused": False},
]


def saved_bytes(model, ids):
    """Of all that the backward pass keeps, parameters left out; each piece of memory once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return sum(size for size, _ in kept.values())


def assert_same_gradients(model, ids, **kwargs):
    expected_loss, expected = loss_and_gradients(model, ids, **kwargs)
    expected = {name: None if g is None else g.clone() for name, g in expected.items()}
    model.config.conv_recompute = True
    torch.manual_seed(1)
    loss, gradients = loss_and_gradients(model, ids, **kwargs)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert (gradient is None and gradients[name] is None) or torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_the_same_gradients_to_the_last_bit(fields):
    torch.manual_seed(1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    assert_same_gradients(small_model(**fields).train(), random_ids(2, 12), attention_mask=mask)


def test_the_same_gradients_under_autocast():
    model = small_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_gradients(model, random_ids(2, 12))


def test_the_same_dropout_of_adapters():
    config = LoraConfig(r=2, target_modules=list(QKV), lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(small_model(), config).train()
    torch.manual_seed(1)
    assert_same_gradients(model, random_ids(2, 12))


@pytest.mark.parametrize("targets", [QKV, "all-linear"], ids=["qkv", "all-linear"])
def test_what_the_convolutions_read_is_not_kept(targets):
    model, ids = small_model(conv_targets=targets).train(), random_ids(4, 64)
    kept = saved_bytes(model, ids)
    model.config.conv_recompute = True
    # Each float32 output of a linear layer that a convolution reads, and the filters besides.
    channels = sum(model.config.linear_features(target)[1] for target in model.config.conv_targets)
    inputs = 4 * ids.numel() * channels * model.config.num_hidden_layers
    assert saved_bytes(model, ids) <= kept - inputs


def count_linear_calls(model, ids):
    calls = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(True))
    model(ids, labels=ids, use_cache=False).loss.backward()
    handle.remove()
    return len(calls)


def test_layers_that_are_made_again_as_a_whole_are_so_once():
    model, ids = small_model(conv_recompute=True).train(), random_ids(2, 12)
    assert count_linear_calls(model, ids) == 2
    model.gradient_checkpointing_enable()
    assert count_linear_calls(model, ids) == 2


def test_without_gradients_or_with_a_cache_nothing_is_made_again():
    model, ids = small_model(conv_recompute=True).train(), random_ids(2, 12)
    calls = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(True))
    with torch.no_grad():
        model(ids, use_cache=False)
    assert len(calls) == 1
    model.eval()(ids, labels=ids, use_cache=True).loss.backward()
    assert len(calls) == 2


def test_layers_without_convolutions_are_not_made_again():
    model = small_model(conv_recompute=True, conv_layers=[1]).train()
    assert count_linear_calls(model, random_ids(2, 12)) == 1


def test_no_cache_in_training():
    """Or everything would be kept after all: a model makes a cache where nobody says otherwise."""
    model = small_model(conv_recompute=True)
    ids = random_ids(2, 12)
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is None
    with torch.no_grad():
        assert model(ids).past_key_values is not None
    assert model.eval()(ids).past_key_values is not None
