"""retrofit() of a checkpoint straight into a divided model: the new convolutions are those of one process."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from dynconv_hf import retrofit

from .models import save_base, tokens
from .ranks import Ranks

pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None,
    reason="transformers places distributed models on the accelerator that torch is built for, one to a rank",
)


def equal_on_every_rank(tensor: torch.Tensor) -> bool:
    other = tensor.detach().clone()
    torch.distributed.broadcast(other, src=0)
    return torch.equal(other, tensor)


def assert_starts_as_base(path: Path, division: dict, fields: dict, same_seed: bool) -> None:
    torch.manual_seed(0 if same_seed else torch.distributed.get_rank())
    model = retrofit(path, distributed_config=DistributedConfig(**division), conv_targets="all-linear", **fields)
    base = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, base(tokens()).logits)
    for name, parameter in model.named_parameters():
        if "_conv." not in name:
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert equal_on_every_rank(whole), name
        if name.endswith("filter_proj.weight") and model.config.conv_mode == "lowrank":
            assert whole.unique().numel() > 0.95 * whole.numel(), f"{name} repeats itself"
            assert 0.01 < whole.std() < 0.03, name


@pytest.mark.parametrize("same_seed", [False, True], ids=["other seeds", "same seed"])
@pytest.mark.parametrize("division", [{"tp_size": 2}, {"fsdp_size": 2}], ids=str)
def test_starts_as_base(two_ranks: Ranks, tmp_path: Path, division: dict, same_seed: bool) -> None:
    two_ranks.run(assert_starts_as_base, save_base(tmp_path), division, {}, same_seed)


@pytest.mark.parametrize("mode", ["headwise", "static"])
def test_other_modes(two_ranks: Ranks, tmp_path: Path, mode: str) -> None:
    fields = {"conv_mode": mode, "conv_head_size": 4}
    two_ranks.run(assert_starts_as_base, save_base(tmp_path), {"tp_size": 2}, fields, False)


def assert_model_object_is_refused(path: Path, division: dict) -> None:
    base = LlamaForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**division))
    with pytest.raises(ValueError, match=r"call retrofit\(name_or_path, distributed_config"):
        retrofit(base)


@pytest.mark.parametrize("division", [{"tp_size": 2}, {"fsdp_size": 2}], ids=str)
def test_model_object_is_refused(two_ranks: Ranks, tmp_path: Path, division: dict) -> None:
    two_ranks.run(assert_model_object_is_refused, save_base(tmp_path), division)


def assert_uneven_heads_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 filter heads of a convolution .* evenly, got 2 ranks"):
        retrofit(path, distributed_config=DistributedConfig(tp_size=2), conv_mode="headwise", conv_head_size=16)


def test_uneven_heads_are_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(assert_uneven_heads_are_refused, save_base(tmp_path))
