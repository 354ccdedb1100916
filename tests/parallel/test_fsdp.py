"""FSDP2 on two ranks, each with half of the batch, has the loss and the gradients of one process with all of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from .models import random_model, save_random_model, tokens
from .ranks import Ranks

MODES = ("lowrank", "headwise", "static")


def sharded_by_torch(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def assert_trains_as_one_process(shard: Callable, checkpointing: bool, fields: dict) -> None:
    single, sharded = random_model(**fields), shard(random_model(**fields))
    rank = torch.distributed.get_rank()
    input_ids = tokens(batch=4)
    single.train()
    sharded.train()
    if checkpointing:
        sharded.gradient_checkpointing_enable()
    loss = single(input_ids, labels=input_ids).loss
    loss.backward()
    own_ids = input_ids.chunk(2)[rank]
    own_loss = sharded(own_ids, labels=own_ids).loss
    own_loss.backward()

    mean_loss = own_loss.detach().clone()
    torch.distributed.all_reduce(mean_loss)
    torch.testing.assert_close(mean_loss / 2, loss.detach())
    gradients = {name: parameter.grad for name, parameter in single.named_parameters()}
    for name, parameter in sharded.named_parameters():
        assert parameter.to_local().numel() < gradients[name].numel(), name
        torch.testing.assert_close(
            parameter.grad.full_tensor(), gradients[name], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("mode", MODES)
def test_fully_shard(two_ranks: Ranks, mode: str, checkpointing: bool) -> None:
    fields = {"conv_mode": mode, "conv_targets": "all-linear"}
    two_ranks.run(assert_trains_as_one_process, sharded_by_torch, checkpointing, fields)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_what_is_made_again_is_gathered_again(two_ranks: Ranks, checkpointing: bool) -> None:
    fields = {"conv_targets": "all-linear", "conv_recompute": True, "use_cache": False}
    two_ranks.run(assert_trains_as_one_process, sharded_by_torch, checkpointing, fields)


def sharded_to_convolutions(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for name, module in model.named_modules():
        if name.endswith("q_conv"):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_convolutions_divided_by_themselves(two_ranks: Ranks) -> None:
    two_ranks.run(assert_trains_as_one_process, sharded_to_convolutions, False, {})


def assert_plan_shards_and_saves(path: Path, saved: Path) -> None:
    single = AutoModelForCausalLM.from_pretrained(path)
    sharded = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=2))
    input_ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(sharded(input_ids).logits, single(input_ids).logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(sharded.generate(input_ids, **options), single.generate(input_ids, **options))
    sharded.save_pretrained(saved)
    torch.distributed.barrier()
    again = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    for name, tensor in single.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None,
    reason="transformers places distributed models on the accelerator that torch is built for, one to a rank",
)
def test_plan_of_transformers(two_ranks: Ranks, tmp_path: Path) -> None:
    path = save_random_model(tmp_path / "model", conv_targets="all-linear")
    two_ranks.run(assert_plan_shards_and_saves, path, tmp_path / "saved")
