"""To a Hub and back, in environments of their own: one that has this package, one that has not."""

from ..modeling.models import PROMPT, STORIES
from .hub_server import hub_server
from .processes import run_python, second_environment

PUSH = f"""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    from dynconv_hf import retrofit

    base = LlamaForCausalLM.from_pretrained({STORIES!r})
    base.push_to_hub("base", tags=["stories"])
    model = retrofit("tester/base", conv_targets="all-linear", conv_head_size=4)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "_conv." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.push_to_hub("tester/dynconv", commit_message="First", tags=["mine"])
    tokenizer = AutoTokenizer.from_pretrained({STORIES!r})
    tokenizer.push_to_hub("tester/dynconv")
    inputs = tokenizer({PROMPT!r}, return_tensors="pt")
    torch.save(model(**inputs).logits, "logits.pt")
    torch.save(model.generate(**inputs, max_new_tokens=20, do_sample=False), "text.pt")
"""

LOAD = f"""
    import sys
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained("tester/dynconv", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.tester.dynconv."), type(model)
    tokenizer = AutoTokenizer.from_pretrained("tester/dynconv", trust_remote_code=True)
    inputs = tokenizer({PROMPT!r}, return_tensors="pt")
    assert torch.equal(model(**inputs).logits, torch.load("logits.pt"))
    for cache in (None, "dynamic", "static"):
        text = model.generate(**inputs, max_new_tokens=20, do_sample=False, cache_implementation=cache)
        assert torch.equal(text, torch.load("text.pt")), cache
    model.push_to_hub("tester/again")
    generate = pipeline("text-generation", model="tester/again", tokenizer=tokenizer, trust_remote_code=True)
    again = generate.model
    assert type(again) is not type(model)
    assert torch.equal(again(**inputs).logits, torch.load("logits.pt"))
    assert "dynconv_hf" not in sys.modules
"""

LOAD_WITH_PACKAGE = f"""
    import torch
    import dynconv_hf
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for trust in (None, False, True):
        model = AutoModelForCausalLM.from_pretrained("tester/again", trust_remote_code=trust)
        assert type(model) is dynconv_hf.DynConvLlamaForCausalLM
        assert type(model.config) is dynconv_hf.DynConvLlamaConfig
    inputs = AutoTokenizer.from_pretrained("tester/dynconv")({PROMPT!r}, return_tensors="pt")
    assert torch.equal(model(**inputs).logits, torch.load("logits.pt"))
"""


def test_there_and_back(tmp_path):
    with hub_server() as hub:
        run_python(PUSH, tmp_path, package=True, hub=hub.url)
        run_python(LOAD, tmp_path, package=False, hub=hub.url, python=second_environment(tmp_path / "environment"))
        run_python(LOAD_WITH_PACKAGE, tmp_path, package=True, hub=hub.url)

    first, again = hub.files("tester/dynconv"), hub.files("tester/again")
    code = {name for name in first if name.endswith(".py")}
    assert {name: again[name] for name in code} == {name: first[name] for name in code}
    assert first["config.json"] == again["config.json"]
    card, card_again = first["README.md"].decode(), again["README.md"].decode()
    assert "base_model: tester/base\n" in card and "\n- mine\n" in card and "# dynconv\n" in card
    assert "base_model: tester/dynconv\n" in card_again and 'from_pretrained("tester/again", trust' in card_again
    assert not [request for request in hub.requests if "xet" in request[1]]
