"""Liger finds a function for DynConv models, whatever is imported first. A stand-in: its kernels need a GPU."""

import sys
import textwrap
from importlib import import_module

import pytest
import torch

from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM, DynConvLlamaForSequenceClassification
from dynconv_hf.modeling import modeling_dynconv_llama

from .models import random_ids
from .test_config import SMALL

LIGER = {
    "__init__.py": "",
    "transformers/__init__.py": "from .monkey_patch import *",
    "transformers/functional.py": """
        import torch

        def liger_swiglu(a, b):
            return torch.full_like(a, 3.0)
    """,
    "transformers/monkey_patch.py": """
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        class LigerRMSNorm(LlamaRMSNorm):
            pass

        def apply_liger_kernel_to_llama(**kwargs):
            calls.append(kwargs)

        calls = []
        MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_liger_kernel_to_llama}
    """,
}
ONES = torch.ones(2)
THREES = torch.full((2,), 3.0)


def small_config(**fields) -> DynConvLlamaConfig:
    return DynConvLlamaConfig(**SMALL, **fields)


@pytest.fixture
def liger(tmp_path, monkeypatch):
    """Imports this Liger, which can be imported from now on."""
    for name, source in LIGER.items():
        path = tmp_path / "liger_kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    # What is replaced for all models is put back in the end.
    monkeypatch.setattr(modeling_dynconv_llama, "LlamaRMSNorm", modeling_dynconv_llama.LlamaRMSNorm)
    mlp = modeling_dynconv_llama.DynConvLlamaMLP
    monkeypatch.setattr(mlp, "activate", mlp.activate)
    others = _forget_liger()
    yield lambda: import_module("liger_kernel.transformers.monkey_patch")
    _forget_liger()
    sys.modules.update(others)


def _forget_liger():
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "liger_kernel"}


def apply(liger, **kwargs):
    """As Liger does, for a model type; a model is given only when there is one."""
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN["dynconv_llama"](**kwargs)
    return liger.calls[-1]


@pytest.mark.parametrize("liger_first", [False, True])
def test_a_model_gets_ligers_kernels(liger, liger_first):
    if liger_first:
        liger()
    model = DynConvLlamaForCausalLM(small_config(conv_targets="all-linear"))
    call = apply(liger(), model=model)
    assert call["model"] is model and call["fused_linear_cross_entropy"] and call["rms_norm"]
    # Liger's rotation is not called, and its MLP knows no convolutions.
    assert not call["rope"] and not call["swiglu"]
    for layer in model.model.layers:
        torch.testing.assert_close(layer.mlp.activate(ONES, ONES), THREES)
    assert model(random_ids(1, 3) % model.config.vocab_size).logits.isfinite().all()


def test_what_liger_has_no_kernel_for_stays(liger):
    heads = DynConvLlamaForSequenceClassification(small_config())
    assert not apply(liger(), model=heads)["fused_linear_cross_entropy"]
    model = DynConvLlamaForCausalLM(small_config(hidden_act="gelu"))
    apply(liger(), model=model)
    torch.testing.assert_close(model.model.layers[0].mlp.activate(ONES, ONES), torch.nn.functional.gelu(ONES))
    model = DynConvLlamaForCausalLM(small_config())
    assert not apply(liger(), model=model, swiglu=False, rms_norm=False)["rms_norm"]
    assert (model.model.layers[0].mlp.activate(ONES, ONES) != THREES).all()


def test_models_made_after_liger_was_applied_have_its_kernels(liger):
    # As AutoLigerKernelForCausalLM does, which looks at the config before there is a model.
    module = liger()
    config = small_config()
    apply(module)
    model = DynConvLlamaForCausalLM(config)
    assert type(model.model.norm) is module.LigerRMSNorm
    torch.testing.assert_close(model.model.layers[0].mlp.activate(ONES, ONES), THREES)


def test_models_do_not_need_a_liger_that_works(liger, tmp_path):
    (tmp_path / "liger_kernel" / "transformers" / "__init__.py").write_text("raise RuntimeError('no such GPU')")
    model = DynConvLlamaForCausalLM(small_config())
    assert model(random_ids(1, 3) % model.config.vocab_size).logits.isfinite().all()
