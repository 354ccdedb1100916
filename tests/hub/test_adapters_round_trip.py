"""Adapters to a Hub and back by name, in processes of their own."""

from ..modeling.models import PROMPT, STORIES
from .hub_server import hub_server
from .processes import run_python

PUSH = f"""
    import torch
    from peft import get_peft_model
    from transformers import AutoTokenizer, LlamaForCausalLM
    from dynconv_hf import freeze_base, lora_config, push_conv_adapter, retrofit, save_conv_adapter

    base = LlamaForCausalLM.from_pretrained({STORIES!r})
    base.push_to_hub("tester/base")
    ids = AutoTokenizer.from_pretrained({STORIES!r})({PROMPT!r}, return_tensors="pt").input_ids

    model = freeze_base(retrofit("tester/base"))
    lora = retrofit("tester/base")
    lora = get_peft_model(lora, lora_config(lora, r=4))
    torch.manual_seed(0)
    for parameter in (*model.parameters(), *lora.parameters()):
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    save_conv_adapter(model, "adapter")
    open("adapter/notes.txt", "w").write("mine")
    print(push_conv_adapter("adapter", "convs"))
    torch.save((ids, model(ids).logits), "first.pt")
    lora.push_to_hub("tester/lora")
    torch.save((ids, lora.eval()(ids).logits), "lora.pt")

    # The adapter moves on, and so does the base on the Hub.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    save_conv_adapter(model, "adapter", overwrite=True)
    print(push_conv_adapter("adapter", "tester/convs", private=True))
    torch.save((ids, model(ids).logits), "second.pt")
    base.model.norm.weight.data.mul_(2)
    base.push_to_hub("tester/base")
"""

LOAD = """
    import sys
    import torch
    from dynconv_hf import load_conv_adapter, load_lora

    def check(file, load, *name, **options):
        ids, expected = torch.load(file)
        # The commit of the base that it was made with.
        assert torch.equal(load(*name, **options)(ids).logits, expected), file
        assert not torch.equal(load(*name, base="tester/base", **options)(ids).logits, expected), file

    check("first.pt", load_conv_adapter, "tester/convs", adapter_revision=FIRST)
    check("second.pt", load_conv_adapter, "tester/convs")
    check("lora.pt", load_lora, "tester/lora")
    try:
        load_conv_adapter("tester/base")
    except OSError as error:
        assert "conv_adapter_config.json" in str(error)
    else:
        raise AssertionError("a model was taken for an adapter")
"""


def test_there_and_back_by_name(tmp_path):
    with hub_server() as hub:
        urls = run_python(PUSH, tmp_path, package=True, hub=hub.url).split()
        first, second = (url.rpartition("/")[2] for url in urls)
        assert [commit.sha for commit in hub.repos["tester/convs"][1:]] == [first, second]
        elsewhere = {"HF_HOME": str(tmp_path / "elsewhere")}
        run_python(LOAD.replace("FIRST", repr(first)), tmp_path, package=True, hub=hub.url, **elsewhere)
    names = {"conv_adapter.safetensors", "conv_adapter_config.json", "README.md"}
    assert hub.files("tester/convs").keys() - {".gitattributes"} == names
    assert "base_model: tester/base\n" in hub.files("tester/convs")["README.md"].decode()
