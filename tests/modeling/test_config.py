"""The configuration: defaults, what follows from it, its life as a file, and every wrong field."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, DynamicCache, StaticCache

from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM
from dynconv_hf.kernels import MAX_KERNEL_SIZE
from dynconv_hf.modeling import configuration_dynconv_llama as configuration

from .models import random_ids

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

conv_fields = st.fixed_dictionaries(
    {
        "conv_mode": st.sampled_from(configuration.CONV_MODES),
        "conv_targets": st.one_of(
            st.just("all-linear"), st.lists(st.sampled_from(configuration.CONV_TARGETS), min_size=1, unique=True)
        ),
        "conv_kernel_size": st.integers(1, 8),
        "conv_rank": st.integers(1, 5),
        "conv_head_size": st.sampled_from([1, 2, 4, 8, 16]),
        "conv_static": st.just(True),
        "conv_layers": st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=1, unique=True)),
        "conv_init": st.sampled_from(configuration.CONV_INITS),
        "conv_recompute": st.booleans(),
        "conv_fused": st.booleans(),
    }
)


def test_defaults():
    config = DynConvLlamaConfig()
    assert config.model_type == "dynconv_llama"
    assert config.conv_targets == ["q_proj", "k_proj", "v_proj"]
    assert (config.conv_mode, config.conv_kernel_size, config.conv_rank) == ("lowrank", 4, 15)
    assert (config.conv_head_size, config.conv_static, config.conv_residual) == (16, True, True)
    assert (config.conv_layers, config.conv_init) == (None, "uniform")
    assert (config.conv_recompute, config.conv_fused) == (False, True)
    assert configuration.MAX_KERNEL_SIZE == MAX_KERNEL_SIZE


def test_defaults_are_not_shared_between_configs():
    DynConvLlamaConfig().conv_targets.append("o_proj")
    assert DynConvLlamaConfig().conv_targets == ["q_proj", "k_proj", "v_proj"]


def test_names_are_put_in_order():
    config = DynConvLlamaConfig(conv_targets=["v_proj", "q_proj", "v_proj"], conv_layers=[5, 1, 5])
    assert config.conv_targets == ["q_proj", "v_proj"] and config.conv_layers == [1, 5]
    assert DynConvLlamaConfig(conv_targets="all-linear").conv_targets == list(configuration.CONV_TARGETS)


@given(conv_fields)
def test_any_config_runs_caches_and_survives_a_file(tmp_path_factory, fields):
    config = DynConvLlamaConfig(**SMALL, **fields)
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    again = AutoConfig.from_pretrained(folder)
    assert type(again) is DynConvLlamaConfig
    assert {f: getattr(again, f) for f in fields} == {f: getattr(config, f) for f in fields}
    assert "layer_types" not in json.loads((folder / "config.json").read_text())

    model = DynConvLlamaForCausalLM(again).eval()
    cache = StaticCache(config=config, max_cache_len=6)
    assert len(cache) == len(DynamicCache(config=config)) == 3
    assert model(random_ids(2, 5), past_key_values=cache).logits.shape == (2, 5, 512)
    convs = {name for name, _ in model.named_parameters() if "_conv." in name}
    layers = {int(name.split(".")[2]) for name in convs}
    assert layers == set(range(3) if fields["conv_layers"] is None else fields["conv_layers"])
    targets = {name.split(".")[4].replace("_conv", "_proj") for name in convs}
    assert targets == set(config.conv_targets)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"conv_targets": ["q_proj", "lm_head"]}, ValueError, r"conv_targets .*'q_proj'.*all-linear.*got .*'lm_head'"),
        ({"conv_targets": []}, ValueError, r"conv_targets must be .*got \[\]"),
        ({"conv_targets": "q_proj"}, TypeError, "conv_targets must be .*got 'q_proj'"),
        ({"conv_targets": None}, TypeError, "conv_targets must be .*got None"),
        ({"conv_mode": "dense"}, ValueError, r"conv_mode must be one of \['lowrank', .*got 'dense'"),
        ({"conv_rank": 0}, ValueError, "conv_rank must be an integer of at least 1, got 0"),
        ({"conv_rank": 1.5}, TypeError, "conv_rank must be an integer of at least 1, got 1.5"),
        ({"conv_kernel_size": 0}, ValueError, "conv_kernel_size must be an integer from 1 to 8, got 0"),
        ({"conv_kernel_size": 9}, ValueError, "conv_kernel_size must be an integer from 1 to 8, got 9"),
        ({"conv_kernel_size": True}, TypeError, "conv_kernel_size must be .*got True"),
        ({"conv_head_size": 0}, ValueError, "conv_head_size must be an integer of at least 1, got 0"),
        (
            {"conv_mode": "headwise", "conv_head_size": 32, "conv_targets": "all-linear"},
            ValueError,
            "conv_head_size must divide .*got 32 for k_proj with 16 channels",
        ),
        ({"conv_layers": [0, 3]}, ValueError, r"conv_layers must be .*from 0 to 2, got \[0, 3\]"),
        ({"conv_layers": [-1]}, ValueError, r"conv_layers must be .*got \[-1\]"),
        ({"conv_layers": []}, ValueError, r"conv_layers must be .*got \[\]"),
        ({"conv_layers": ["0"]}, TypeError, r"conv_layers must be .*got \['0'\]"),
        ({"conv_layers": 2}, TypeError, "conv_layers must be .*got 2"),
        ({"conv_static": 1}, TypeError, "conv_static must be True or False, got 1"),
        (
            {"conv_mode": "static", "conv_static": False},
            ValueError,
            'conv_static must be True with conv_mode="static"',
        ),
        ({"conv_residual": None}, TypeError, "conv_residual must be True or False, got None"),
        ({"conv_recompute": 1}, TypeError, "conv_recompute must be True or False, got 1"),
        ({"conv_fused": "yes"}, TypeError, "conv_fused must be True or False, got 'yes'"),
        ({"conv_init": "zeros"}, ValueError, r"conv_init must be one of \['uniform', 'identity'\], got 'zeros'"),
        ({"conv_init": "identity", "conv_residual": False}, ValueError, "conv_residual must be True with conv_init"),
    ],
)
def test_wrong_fields(fields, error, message):
    with pytest.raises(error, match=message):
        DynConvLlamaConfig(**SMALL, **fields)


def test_a_head_size_larger_than_the_default_model_divides_is_no_error_in_other_modes():
    assert DynConvLlamaConfig(**SMALL, conv_head_size=5).conv_head_size == 5
