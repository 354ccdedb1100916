"""Training: every convolution parameter learns, also from an identity start; checkpointing changes no gradient."""

import pytest
import torch

from dynconv_hf import retrofit

from .models import STORIES, VARIANTS, moved_model, random_ids

variants = pytest.mark.parametrize(("mode", "targets"), VARIANTS)


def conv_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if "_conv." in name}


def loss_of(model, ids):
    return model(ids, labels=ids, use_cache=False).loss


@variants
def test_every_convolution_parameter_learns_within_two_steps_of_an_identity_start(mode, targets):
    model = retrofit(STORIES, conv_mode=mode, conv_targets=targets, conv_head_size=4).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moving = set()
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, random_ids(2, 16)).backward()
        for name, parameter in conv_parameters(model).items():
            assert parameter.grad.isfinite().all(), name
            if parameter.grad.abs().max() > 0:
                moving.add(name)
        optimizer.step()
    assert moving == set(conv_parameters(model))


def test_from_an_identity_start_the_basis_learns_at_once_and_the_projection_next():
    model = retrofit(STORIES).train()
    loss_of(model, random_ids(2, 16)).backward()
    for name, parameter in conv_parameters(model).items():
        assert (parameter.grad.abs().max() == 0) == ("filter_proj" in name), name


@variants
def test_gradient_checkpointing_gives_the_same_gradients(mode, targets):
    ids = random_ids(2, 12)

    def gradients(checkpointing):
        model = moved_model(mode, targets).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_of(model, ids).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name


def test_gradient_checkpointing_of_packed_rows():
    ids, position_ids = random_ids(1, 12), torch.tensor([[*range(5), *range(7)]])

    def embedding_gradient(checkpointing):
        model = moved_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, position_ids=position_ids, use_cache=False).loss.backward()
        return model.get_input_embeddings().weight.grad

    assert torch.equal(embedding_gradient(True), embedding_gradient(False))


def test_training_lowers_the_loss_of_a_retrofitted_model():
    model = retrofit(STORIES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = random_ids(4, 32)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
