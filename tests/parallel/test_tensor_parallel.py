"""Tensor parallelism on two ranks equals one process: loading, logits, generation, gradients, saving."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from .models import save_random_model, tokens
from .ranks import Ranks

TARGETS = {"qkv": ["q_proj", "k_proj", "v_proj"], "all-linear": "all-linear", "o+down": ["o_proj", "down_proj"]}

pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None,
    reason="transformers places tensor parallel models on the accelerator that torch is built for, one to a rank",
)


def load_divided(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equals_one_process(path: Path, saved: Path) -> None:
    single, divided = AutoModelForCausalLM.from_pretrained(path), load_divided(path)
    input_ids = tokens()
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0

    with torch.no_grad():
        torch.testing.assert_close(
            divided(input_ids, attention_mask=attention_mask).logits[attention_mask == 1],
            single(input_ids, attention_mask=attention_mask).logits[attention_mask == 1],
            rtol=1e-5,
            atol=1e-5,
        )
    for cache in ("dynamic", "static"):
        options = {"attention_mask": attention_mask, "max_new_tokens": 12, "do_sample": False}
        options |= {"cache_implementation": cache, "disable_compile": True}
        assert torch.equal(divided.generate(input_ids, **options), single.generate(input_ids, **options))

    for checkpointing in (False, True):
        for model in (single, divided):
            model.train().zero_grad()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(input_ids, attention_mask=attention_mask, labels=input_ids).loss.backward()
        divided_gradients = {name: whole(p.grad) for name, p in divided.named_parameters()}
        for name, parameter in single.named_parameters():
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(
                divided_gradients[name],
                parameter.grad,
                rtol=1e-4,
                atol=1e-6,
                msg=lambda text, name=name: f"{name}: {text}",
            )

    divided.save_pretrained(saved)
    torch.distributed.barrier()
    again = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert again.keys() == single.state_dict().keys()
    for name, tensor in single.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("mode", ["lowrank", "headwise", "static"])
def test_equals_one_process(two_ranks: Ranks, tmp_path: Path, mode: str, targets: str) -> None:
    path = save_random_model(tmp_path / "model", conv_mode=mode, conv_targets=TARGETS[targets])
    two_ranks.run(assert_equals_one_process, path, tmp_path / "saved")
