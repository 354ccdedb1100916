"""What only a GPU shows: offloaded caches, CUDA graphs, half precision, models over several devices."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM, kernels, retrofit

from .models import QKV, STORIES, base_model, move_convs, moved_model, prompt_ids, random_ids
from .test_config import SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 100}


@pytest.fixture(scope="module", params=[QKV, "all-linear"], ids=["qkv", "all-linear"])
def model(request):
    # float64 sums do not depend on the shape of a batch enough to change a token.
    return moved_model(targets=request.param).double().cuda()


@pytest.fixture(scope="module")
def greedy(model):
    return model.generate(random_ids(2, 7).cuda(), **GREEDY)


def test_greedy_equals_the_argmax_of_a_full_forward_pass(model, greedy):
    with torch.no_grad():
        argmax = model(greedy, use_cache=False).logits.argmax(-1)
    assert torch.equal(argmax[:, 6:-1], greedy[:, 7:])


def test_offloaded_cache(model, greedy):
    assert torch.equal(model.generate(random_ids(2, 7).cuda(), **GREEDY, cache_implementation="offloaded"), greedy)


def test_offloaded_cache_is_on_the_cpu_between_steps(model):
    cache = DynamicCache(config=model.config, offloading=True)
    with torch.no_grad():
        chunks = [model(chunk, past_key_values=cache).logits for chunk in random_ids(2, 24).cuda().split(3, dim=1)]
        expected = model(random_ids(2, 24).cuda(), use_cache=False).logits
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert cache.layers[2].keys.device.type == "cpu"


def test_offloaded_static_cache_is_an_error(model):
    with pytest.raises(ValueError, match='use cache_implementation="offloaded" or "static"'):
        model.generate(random_ids(2, 7).cuda(), **GREEDY, cache_implementation="offloaded_static")


@pytest.mark.parametrize("left_padding", [False, True])
def test_static_cache_in_cuda_graphs(model, greedy, left_padding):
    torch.compiler.reset()
    ids, padding = random_ids(2, 7).cuda(), 0
    mask = torch.ones_like(ids)
    if left_padding:
        padding = 4
        ids = torch.nn.functional.pad(ids, (padding, 0))
        mask = torch.nn.functional.pad(mask, (padding, 0))
    options = {
        "cache_implementation": "static",
        "compile_config": CompileConfig(mode="reduce-overhead", fullgraph=True),
    }
    for _ in range(2):
        out = model.generate(ids, attention_mask=mask, **GREEDY, **options)
        assert torch.equal(out[:, padding:], greedy)


def test_rollback(model, greedy):
    out = model.generate(random_ids(2, 7)[:1].cuda(), **GREEDY, prompt_lookup_num_tokens=4)
    assert torch.equal(out, greedy[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_identity_to_the_last_bit(dtype, attention):
    options = {"dtype": dtype, "device_map": "cuda", "attn_implementation": attention}
    base, model = base_model(**options), retrofit(STORIES, conv_targets="all-linear", **options)
    ids = prompt_ids().cuda()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
    greedy = {"do_sample": False, "max_new_tokens": 200}
    assert torch.equal(model.generate(ids, **greedy), base.generate(ids, **greedy))


def test_compiled_training_step():
    torch.compiler.reset()
    model = moved_model().cuda().train()
    ids = random_ids(4, 64).cuda()
    expected = model(ids, labels=ids, use_cache=False).loss
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    loss = compiled(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-3 * scale)


def test_training_under_autocast():
    model = retrofit(STORIES).cuda().train()
    ids = random_ids(4, 64).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(ids, labels=ids, use_cache=False).loss.backward()
    basis = model.model.layers[0].self_attn.q_conv.basis
    assert basis.grad.dtype == torch.float32 and basis.grad.abs().max() > 0


def test_a_static_cache_made_by_hand(model, greedy):
    cache = StaticCache(config=model.config, max_cache_len=128)
    out = model.generate(random_ids(2, 7).cuda(), past_key_values=cache, **GREEDY, disable_compile=True)
    assert torch.equal(out, greedy)


def wide_model(dtype=torch.bfloat16, **kwargs):
    """Wide enough for the fastest kernels: they take channels by the 128."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**{**SMALL, **sizes, **kwargs}))
    return move_convs(model).to("cuda", dtype)


def loss_and_gradients(model, ids, mask):
    loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: parameter.grad.double() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("targets", [list(QKV), "all-linear"], ids=["qkv", "all-linear"])
@pytest.mark.parametrize("mode", ["lowrank", "headwise", "static"])
def test_kernels_train_as_the_reference_does(mode, targets, monkeypatch):
    """No further from float32 than the reference is in bfloat16."""
    ids, mask = random_ids(4, 300).cuda(), torch.ones(4, 300, dtype=torch.long, device="cuda")
    mask[0, :7] = 0
    options = {"conv_mode": mode, "conv_targets": targets}
    model = wide_model(**options)
    conv = model.model.layers[0].self_attn.q_conv
    if mode == "lowrank":
        x, coefficients = torch.zeros(4, 300, 256).cuda().bfloat16(), torch.zeros(4, 300, 15).cuda().bfloat16()
        choice = kernels.describe_implementation(x, coefficients, conv.basis, static_filter=conv.static_filter)
        assert choice.name == "triton: lowrank_gluon", choice.reason
    _, gradients = loss_and_gradients(model, ids, mask)
    monkeypatch.setenv("DYNCONV_IMPL", "reference")
    _, reference = loss_and_gradients(model, ids, mask)
    _, exact = loss_and_gradients(wide_model(torch.float32, **options), ids, mask)
    for name in exact:
        ours, theirs = ((g[name] - exact[name]).norm() for g in (gradients, reference))
        assert ours <= 1.3 * theirs + 1e-3 * exact[name].norm(), name


def test_kernels_keep_the_identity_to_the_last_bit():
    torch.manual_seed(0)
    model = wide_model(conv_init="identity")
    for name, parameter in model.named_parameters():
        if name.endswith(("basis", "static_filter")):
            parameter.data.zero_()
    ids = random_ids(2, 100).cuda()
    with torch.no_grad():
        logits = model(ids).logits
        for layer in model.model.layers:
            for name in ("q_conv", "k_conv", "v_conv"):
                setattr(layer.self_attn, name, None)
        assert torch.equal(model(ids, use_cache=False).logits, logits)


@pytest.mark.parametrize("mode", ["lowrank", "headwise", "static"])
def test_kernels_compiled_and_in_cuda_graphs(mode):
    torch.compiler.reset()
    model = wide_model(torch.float32, conv_mode=mode, num_hidden_layers=1).eval()
    ids, mask = random_ids(2, 9).cuda(), torch.ones(2, 9, dtype=torch.long, device="cuda")
    mask[0, :4] = 0
    options = {**GREEDY, "max_new_tokens": 40, "attention_mask": mask}
    expected = model.generate(ids, **options)
    graphs = CompileConfig(mode="reduce-overhead", fullgraph=True)
    for _ in range(2):
        out = model.generate(ids, **options, cache_implementation="static", compile_config=graphs)
        assert torch.equal(out, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(ids, use_cache=False).logits,
            model(ids, use_cache=False).logits,
            rtol=1e-4,
            atol=1e-4,
        )
