"""The model card: what it says, when it is refreshed, and that what somebody wrote stays."""

import json
import os

import pytest
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

import dynconv_hf
from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM, hub, retrofit

from ..modeling.models import STORIES
from ..modeling.test_config import SMALL
from .hub_server import hub_server
from .processes import run_python


@pytest.fixture
def model():
    return DynConvLlamaForCausalLM(DynConvLlamaConfig(**SMALL))


def _card(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_it_says_what_the_model_is(tmp_path):
    model = retrofit(STORIES, conv_mode="headwise", conv_kernel_size=3)
    model.save_pretrained(tmp_path / "stories")
    card = _card(tmp_path / "stories")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dynconv", "dynamic-short-convolution", "llama"],
    }
    text = card.text
    assert "# stories\n" in text and 'from_pretrained("stories", trust_remote_code=True)' in text
    assert "import dynconv_hf\n" in text and "custom code" in text and "last 3 tokens" in text
    assert "| `conv_head_size` | `16` |" in text and '| `conv_targets` | `["q_proj", "k_proj", "v_proj"]` |' in text
    assert "conv_rank" not in text
    convs = sum(p.numel() for name, p in model.named_parameters() if "_conv." in name)
    assert f"| Convolutions | {convs:,} (" in text and "| Base | 260,032 |" in text


@pytest.mark.parametrize(
    ("auto_class", "task"),
    [
        ("AutoModel", "feature-extraction"),
        ("AutoModelForQuestionAnswering", "question-answering"),
        ("AutoModelForSequenceClassification", "text-classification"),
        ("AutoModelForTokenClassification", "token-classification"),
    ],
)
def test_every_head_has_its_task(tmp_path, auto_class, task):
    head = getattr(dynconv_hf, hub.AUTO_MAP[auto_class].partition(".")[2])
    head(DynConvLlamaConfig(**SMALL)).save_pretrained(tmp_path)
    assert _card(tmp_path).data.pipeline_tag == task
    assert f"from transformers import {auto_class}\n" in _card(tmp_path).text


def test_it_is_the_same_every_time_and_refreshed(model, tmp_path):
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    DynConvLlamaForCausalLM(DynConvLlamaConfig(**SMALL, conv_rank=3)).save_pretrained(tmp_path)
    assert "| `conv_rank` | `3` |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "# My model\n",
        lambda text: "",
        lambda text: text + "\nMy evaluation.\n",
        lambda text: text.replace("library_name: transformers", "library_name: transformers\nlicense: mit"),
        lambda text: text.replace("library_name: transformers", "library_name: [unreadable"),
        lambda text: text.replace("Digest: ", "Digest: 0"),
        lambda text: "caf\xe9",
    ],
)
def test_what_somebody_wrote_stays(model, tmp_path, edit):
    model.save_pretrained(tmp_path)
    mine = edit((tmp_path / "README.md").read_text()).encode("latin-1")
    (tmp_path / "README.md").write_bytes(mine)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == mine


def test_tags_are_no_edit(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = _card(tmp_path)
    card.data.tags.append("mine")
    card.save(tmp_path / "README.md")
    DynConvLlamaForCausalLM(DynConvLlamaConfig(**SMALL, conv_rank=3)).save_pretrained(tmp_path)
    assert _card(tmp_path).data.tags[-1] == "mine" and "| `conv_rank` | `3` |" in _card(tmp_path).text


def test_licence_and_base_come_along(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in os.listdir(STORIES):
        os.symlink(os.path.join(STORIES, name), base / name)
    (base / "README.md").unlink()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: llama9\nbase_model: a/b\n---\n# Base\n")
    retrofit(base).save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / "model.safetensors").exists()
    card = _card(tmp_path / "first")
    # The base has no name on the Hub, and what it is made from is not what this model is made from.
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "llama9", None)
    card.data.base_model = "me/base"
    card.save(tmp_path / "first" / "README.md")
    DynConvLlamaForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    card = _card(tmp_path / "second")
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "llama9", "me/base")


def test_the_card_of_trainer(model, tmp_path):
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    trainer.save_model()
    assert "dynconv" in _card(tmp_path).data.tags
    trainer.create_model_card(tags=["mine"], model_name="Mine", language="en")
    card = _card(tmp_path)
    assert card.data.model_name == "Mine" or "Mine" in card.text
    assert {"mine", "dynconv", "dynamic-short-convolution"} <= set(card.data.tags)
    trainer.save_model()
    assert str(_card(tmp_path)) == str(card)


def test_on_the_hub(tmp_path):
    script = f"""
        import json
        from pathlib import Path
        from huggingface_hub import HfApi, ModelCard
        from transformers import LlamaForCausalLM
        from dynconv_hf import DynConvLlamaForCausalLM, retrofit

        def push(model, repo, card=None, **kwargs):
            if card is not None:
                model.config.push_to_hub(repo)
                HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo)
            model.push_to_hub(repo, **kwargs)
            return ModelCard.load(repo)

        base = LlamaForCausalLM.from_pretrained({STORIES!r})
        push(base, "tester/base", "---\\nlicense: other\\nlicense_name: l9\\n---\\n")
        model = retrofit("tester/base")
        card = push(model, "tester/new")
        assert (card.data.license_name, card.data.base_model) == ("l9", "tester/base"), card.data
        model = DynConvLlamaForCausalLM.from_pretrained("tester/new")
        card = push(model, "tester/new", tags=["later"])
        assert (card.data.license_name, card.data.base_model) == ("l9", "tester/base"), card.data
        assert card.data.tags[-1] == "later" and "Parameters" in card.text

        card = push(model, "tester/written", "---\\nlicense: mit\\n---\\n# Mine\\n", tags=["x"])
        assert card.data.to_dict() == {{"license": "mit", "tags": ["x"]}} and card.text.strip() == "# Mine"

        folder = Path("local")
        folder.mkdir()
        (folder / "README.md").write_text("# Mine\\n")
        model.save_pretrained(folder, push_to_hub=True, repo_id="tester/local", commit_message="From a folder")
        assert (folder / "README.md").read_text() == "# Mine\\n"
        assert ModelCard.load("tester/local").data.base_model == "tester/new"
        model.config.save_pretrained("config", push_to_hub=True, repo_id="tester/config")
        model.config.save_pretrained("config", push_to_hub=True, repo_id="tester/config2")
        model.save_pretrained("config", push_to_hub=True, repo_id="tester/config3")
        """
    with hub_server() as server:
        run_python(script, tmp_path, package=True, hub=server.url)
        for repo in ("new", "written", "local", "config", "config2", "config3"):
            assert hub.code_files().keys() <= server.files(f"tester/{repo}").keys(), repo
            assert json.loads(server.files(f"tester/{repo}")["config.json"])["auto_map"] == hub.AUTO_MAP
        assert "From a folder" in [commit.message for commit in server.repos["tester/local"]]
