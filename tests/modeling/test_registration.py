"""What other libraries look up by a name, they find here as for a Llama."""

import logging

import peft
import pytest
import torch
from peft.utils import constants
from transformers import AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.models.auto import modeling_auto

import dynconv_hf
from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM, retrofit

from ..hub.processes import run_python
from .models import STORIES, base_model, random_ids
from .test_config import SMALL


def small_model() -> DynConvLlamaForCausalLM:
    return DynConvLlamaForCausalLM(DynConvLlamaConfig(**SMALL)).eval()


@torch.no_grad()
def trainer_loss(model, folder, smoothing):
    arguments = TrainingArguments(output_dir=folder, label_smoothing_factor=smoothing, use_cpu=True, report_to=[])
    ids = random_ids(2, 16)
    return Trainer(model=model, args=arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})


@pytest.mark.parametrize("adapted", [False, True])
def test_smoothed_labels_are_those_of_the_next_token(tmp_path, adapted):
    model, base = retrofit(STORIES, dtype=torch.float32).eval(), base_model(dtype=torch.float32)
    if adapted:
        model = peft.get_peft_model(model, dynconv_hf.lora_config(model)).eval()
    torch.testing.assert_close(trainer_loss(model, tmp_path, 0.1), trainer_loss(base, tmp_path, 0.1))


def test_every_table_of_transformers_that_names_llama_names_its_counterpart():
    tables = {
        name: table
        for name, table in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES") and "llama" in table
    }
    assert {"MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"} < tables.keys()
    for name, table in tables.items():
        assert table["dynconv_llama"] == f"DynConv{table['llama']}", name
        assert hasattr(dynconv_hf, table["dynconv_llama"])


def test_pipelines_know_the_model(caplog):
    logging.getLogger("transformers").propagate = True
    try:
        pipe = pipeline("text-generation", model=small_model(), tokenizer=AutoTokenizer.from_pretrained(STORIES))
    finally:
        logging.getLogger("transformers").propagate = False
    assert pipe.model.config.model_type == "dynconv_llama"
    assert "is not supported" not in caplog.text


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "AdaLoraConfig", "LNTuningConfig"])
def test_peft_adapts_by_default_what_it_adapts_in_a_llama(method):
    arguments = {"total_step": 10} if method == "AdaLoraConfig" else {}
    found = [
        {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
        for base in (small_model(), base_model())
        for model in [peft.get_peft_model(base, getattr(peft, method)(task_type="CAUSAL_LM", **arguments))]
    ]
    assert {name.rpartition(".")[2] for name in found[0]} == {name.rpartition(".")[2] for name in found[1]} != set()


def test_peft_tables_that_compute_what_a_llama_would_stay_as_they_are():
    assert "dynconv_llama" in constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    with pytest.raises(ValueError, match="Unsupported model type"):
        peft.get_peft_model(
            small_model(), peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
        )


def test_serving_engines_are_told_that_their_cache_does_not_do():
    assert base_model().is_backend_compatible()
    for name in dynconv_hf.modeling.modeling_dynconv_llama.__all__:
        assert not getattr(dynconv_hf.modeling.modeling_dynconv_llama, name).is_backend_compatible(), name


def test_replaced_functions_of_llama_change_nothing(tmp_path):
    run_python(
        """
        import torch
        from torch import nn
        from transformers.models.llama import modeling_llama

        class OtherMLP(nn.Module):  # As Liger's: without an attribute for the activation.
            def __init__(self, config):
                super().__init__()
                sizes = config.hidden_size, config.intermediate_size
                self.gate_proj, self.up_proj = (nn.Linear(*sizes, bias=False) for _ in range(2))
                self.down_proj = nn.Linear(*reversed(sizes), bias=False)

        def rotates_heads_before_tokens(query, key, *args, **kwargs):
            raise AssertionError("called for a layout that it does not know")

        modeling_llama.LlamaMLP = OtherMLP
        modeling_llama.apply_rotary_pos_emb = rotates_heads_before_tokens
        from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM

        config = DynConvLlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                    num_attention_heads=2, conv_fused=False)
        assert DynConvLlamaForCausalLM(config)(torch.ones(1, 5, dtype=torch.long)).logits.isfinite().all()
        """,
        tmp_path,
        package=True,
    )
