"""A sequence divided over ranks is refused: convolutions need the inputs before a rank's part."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import ParallelismConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dynconv_hf import DynConvLlamaForCausalLM

from .models import random_model, tokens
from .ranks import Ranks


def local_attention(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


def gathering_attention(module, query, key, value, *args, **kwargs):
    gathered = [torch.empty_like(key) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, key.contiguous())
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def ring_attention(module, query, key, value, *args, **kwargs):
    if dist.get_rank() == 0:
        dist.send(key.contiguous(), 1)
    else:
        dist.recv(torch.empty_like(key), 0)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def model_with(attention: Callable, **fields) -> DynConvLlamaForCausalLM:
    model = random_model(**fields)
    AttentionInterface.register(attention.__name__, attention)
    model.set_attn_implementation(attention.__name__)
    return model


def assert_attention_over_ranks_is_refused() -> None:
    ids = tokens()
    for attention in (gathering_attention, ring_attention):
        with pytest.raises(ValueError, match=rf"{attention.__name__} talks to other ranks .* convolutions with"):
            model_with(attention)(ids, labels=ids)
        model_with(attention, conv_kernel_size=1)(ids)


def test_attention_over_ranks(two_ranks: Ranks) -> None:
    two_ranks.run(assert_attention_over_ranks_is_refused)


def assert_own_attention_of_one_rank_works() -> None:
    ids, model = tokens(), model_with(local_attention, num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"call the model once without torch\.compile"):
        compiled(ids, use_cache=False)
    expected = random_model(num_hidden_layers=1)(ids, use_cache=False).logits
    for _ in range(2):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)


def test_own_attention_of_one_rank(two_ranks: Ranks) -> None:
    two_ranks.run(assert_own_attention_of_one_rank_works)


def assert_context_parallel_is_refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model, ids = random_model(num_hidden_layers=1), tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
        for call in (model, compiled):
            with pytest.raises(Exception, match=r"context_parallel is active.* convolutions with conv_kernel_size=4"):
                call(ids, use_cache=False)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_context_parallel(two_ranks: Ranks) -> None:
    two_ranks.run(assert_context_parallel_is_refused)


def assert_accelerate_is_refused(name: str) -> None:
    ids, state = tokens(), AcceleratorState._shared_state
    state["parallelism_config"] = ParallelismConfig(**{name: 2})
    try:
        with pytest.raises(ValueError, match=rf"{name}=2, but .* convolutions with .* set {name}=1"):
            random_model()(ids)
        random_model(conv_kernel_size=1)(ids)
        state["parallelism_config"] = ParallelismConfig()
        random_model()(ids)
    finally:
        del state["parallelism_config"]


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_accelerate(two_ranks: Ranks, name: str) -> None:
    two_ranks.run(assert_accelerate_is_refused, name)
