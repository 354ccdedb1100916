"""Convolutions made together, RoPE included: the same model as one by one, and only where nobody would notice.

The filters of a group are one matrix product, whose sums may be in another order: equal up to rounding.
"""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM, lora_config
from dynconv_hf.modeling import modeling_dynconv_llama

from .models import QKV, VARIANTS, move_convs, moved_model, random_ids
from .test_config import SMALL

MODELS = [
    *({"conv_mode": mode, "conv_targets": targets} for mode, targets in VARIANTS),
    {"conv_targets": ["q_proj", "k_proj"]},
    {"conv_targets": ["q_proj", "v_proj", "up_proj"]},
    {"conv_targets": ["k_proj"]},
    {"conv_targets": "all-linear", "conv_layers": [1]},
    {"conv_targets": "all-linear", "conv_rank": 16, "conv_static": False, "conv_kernel_size": 3},
    {"conv_targets": "all-linear", "conv_rank": 5, "conv_residual": False, "conv_kernel_size": 1},
    {"conv_targets": "all-linear", "conv_mode": "headwise", "conv_kernel_size": 5},
]


def small_model(**kwargs):
    torch.manual_seed(0)
    return move_convs(DynConvLlamaForCausalLM(DynConvLlamaConfig(**{**SMALL, "conv_head_size": 4, **kwargs}))).eval()


class Groups(list):
    """What is convolved together: for each call the numbers of channels, and which tensors are rotated."""

    def count(self, convs, xs, hidden_states, positions, initial_states, rotary=None):
        self.append(([conv.channels for conv in convs], rotary and rotary.rotated))
        return self.whole(convs, xs, hidden_states, positions, initial_states, rotary)


@pytest.fixture
def groups(monkeypatch):
    groups = Groups()
    groups.whole = modeling_dynconv_llama.convolve_group
    monkeypatch.setattr(modeling_dynconv_llama, "convolve_group", groups.count)
    return groups


def loss_and_gradients(model, ids, **kwargs):
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False, **kwargs).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(model, ids, **kwargs):
    """Together and one by one: loss and gradients."""
    model.config.conv_fused = True
    loss, gradients = loss_and_gradients(model, ids, **kwargs)
    model.config.conv_fused = False
    expected_loss, expected = loss_and_gradients(model, ids, **kwargs)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_together_as_one_by_one(fields):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    assert_same(small_model(**fields), random_ids(2, 12), attention_mask=mask)


def test_together_as_one_by_one_for_packed_rows():
    position_ids = torch.tensor([[*range(5), *range(7)]])
    assert_same(small_model(conv_targets="all-linear"), random_ids(1, 12), position_ids=position_ids)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn", "llama3"])
def test_together_as_one_by_one_with_rope_scaling(scaling):
    rope = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if scaling == "llama3" else {}
    assert_same(small_model(rope_parameters=rope), random_ids(2, 40))


def test_together_as_one_by_one_under_autocast():
    """cos and sin are float32 there, where queries and keys are not: transformers' own function rotates them."""
    model = small_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(random_ids(2, 12), use_cache=False).logits
        model.config.conv_fused = False
        expected = model(random_ids(2, 12), use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_the_same_tokens(options):
    model = moved_model().double()
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, **options}
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    tokens = model.generate(ids, attention_mask=mask, **options)
    model.config.conv_fused = False
    assert torch.equal(tokens, model.generate(ids, attention_mask=mask, **options))


def test_what_is_together(groups):
    heads, key_value_heads, size = SMALL["num_attention_heads"], SMALL["num_key_value_heads"], SMALL["hidden_size"]
    sizes = [size, size // heads * key_value_heads, size // heads * key_value_heads]
    with torch.no_grad():
        small_model(num_hidden_layers=1)(random_ids(1, 4))
        assert groups == [(sizes, (True, True, False))]
        groups.clear()
        small_model(num_hidden_layers=1, conv_targets="all-linear")(random_ids(1, 4))
        assert groups == [(sizes, (True, True, False)), ([SMALL["intermediate_size"]] * 2, None)]
        groups.clear()
        small_model(num_hidden_layers=1, conv_targets=["q_proj", "v_proj"])(random_ids(1, 4))
        assert groups == [(sizes[:2], None)]
        groups.clear()
        small_model(num_hidden_layers=1, conv_mode="headwise")(random_ids(1, 4))
        assert groups == [(sizes, None)]
        groups.clear()
        for fields in ({"conv_fused": False}, {"conv_mode": "static"}, {"conv_targets": ["o_proj", "gate_proj"]}):
            small_model(num_hidden_layers=1, **fields)(random_ids(1, 4))
        assert groups == []


def replace_forward(conv):
    add_hook_to_module(conv, ModelHook())


def divide(conv):
    """As FSDP2 does: a class made on the spot."""
    conv.__class__ = type("FSDPDynamicShortConv", (type(conv),), {})


def make_subclass(conv):
    """As a DTensor is one."""

    class Divided(torch.Tensor): ...

    conv.basis = nn.Parameter(conv.basis.detach().as_subclass(Divided))


class Identity(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: conv.register_forward_hook(lambda *_: None),
        lambda conv: conv.register_forward_pre_hook(lambda *_: None),
        lambda conv: conv.register_full_backward_hook(lambda *_: None),
        lambda conv: conv.filter_proj.register_forward_hook(lambda *_: None),
        replace_forward,
        lambda conv: replace_forward(conv.filter_proj),
        divide,
        make_subclass,
        lambda conv: parametrize.register_parametrization(conv, "basis", Identity()),
        lambda conv: conv.filter_proj.bfloat16(),
    ],
    ids=[
        "forward hook",
        "forward pre-hook",
        "backward hook",
        "hook on the projection",
        "replaced forward",
        "replaced forward of the projection",
        "another class",
        "another class of parameter",
        "parametrization",
        "another dtype",
    ],
)
def test_a_convolution_that_somebody_touched_is_called(change, groups):
    model = small_model(num_hidden_layers=1)
    expected = model(random_ids(1, 6)).logits
    groups.clear()
    change(model.model.layers[0].self_attn.k_conv)
    logits = model(random_ids(1, 6)).logits
    assert groups == []
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)


def test_hooks_see_their_convolution():
    model, seen = small_model(num_hidden_layers=1), []
    conv = model.model.layers[0].self_attn.v_conv
    conv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(random_ids(1, 6))
    assert seen == [(1, 6, conv.channels)]


def test_another_rank_in_one_place(groups):
    model = small_model(num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    attention.k_conv = move_convs(
        type(attention.k_conv)(attention.k_conv.hidden_size, attention.k_conv.channels, rank=3)
    )
    assert model(random_ids(1, 6)).logits.isfinite().all()
    assert groups == []


def test_convolutions_trained_by_peft_are_called(groups):
    model = small_model()
    expected = model(random_ids(2, 9)).logits
    groups.clear()
    adapted = get_peft_model(model, lora_config(model, r=2))
    torch.testing.assert_close(adapted(random_ids(2, 9)).logits, expected)
    assert groups == []
    adapted(random_ids(2, 9), labels=random_ids(2, 9)).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("q_conv" in name for name in gradients) and all(g is not None for g in gradients.values())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(random_ids(2, 9)).logits, expected)
    assert len(groups) == SMALL["num_hidden_layers"]


def test_lora_on_the_linear_layers_alone(groups):
    from peft import LoraConfig

    model = get_peft_model(small_model(), LoraConfig(r=2, target_modules=list(QKV), init_lora_weights=False))
    expected = model(random_ids(2, 9)).logits
    assert len(groups) == SMALL["num_hidden_layers"]
    model.config.conv_fused = False
    torch.testing.assert_close(model(random_ids(2, 9)).logits, expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_without_recompilation(recompute):
    torch.compiler.reset()
    model = small_model(num_hidden_layers=1, conv_targets="all-linear", conv_recompute=recompute).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for i, (batch, tokens) in enumerate([(2, 8), (3, 17), (4, 33), (5, 20)]):
        ids = random_ids(batch, tokens)
        # The first sizes are compiled as they are, the second for all.
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            loss = compiled(ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        expected_loss, expected = loss_and_gradients(model, ids)
        torch.testing.assert_close(loss, expected_loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, msg=name)
        model.zero_grad()


def test_a_hook_after_compilation_is_seen(groups):
    torch.compiler.reset()
    model, seen = small_model(num_hidden_layers=1), []
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(random_ids(1, 6), use_cache=False)
        model.model.layers[0].self_attn.v_conv.register_forward_hook(lambda *_: seen.append(True))
        compiled(random_ids(1, 6), use_cache=False)
    assert seen
