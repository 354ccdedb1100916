"""The weights of the base: linked, or copied where they cannot be, and never changed by what happens to the copy."""

import errno
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dynconv_hf import retrofit_checkpoint

from .checkpoints import hashes, load_tensors, same_tensors, save_llama


@pytest.fixture(params=["5GB", "20KB"], ids=["single", "sharded"])
def source(request, tmp_path):
    return save_llama(tmp_path / "base", shard_size=request.param)


def shared_files(one, other):
    inodes = {path.stat().st_ino for path in one.iterdir()}
    return [path.name for path in other.iterdir() if path.stat().st_ino in inodes]


def test_weights_are_linked_and_nothing_else_is(source, tmp_path):
    before = hashes(source)
    made = retrofit_checkpoint(source, tmp_path / "made")
    weights = sorted(path.name for path in made.glob("*.safetensors"))
    assert sorted(shared_files(source, made)) == weights[:-1]
    assert hashes(source) == before


def test_copy_shares_nothing(source, tmp_path):
    made = retrofit_checkpoint(source, tmp_path / "copied" / "made", copy=True, conv_mode="static")
    assert shared_files(source, made) == []
    linked = retrofit_checkpoint(source, tmp_path / "linked" / "made", conv_mode="static")
    assert hashes(made) == hashes(linked)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK], ids=errno.errorcode.get)
def test_copied_where_links_are_impossible(code, source, tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    made = retrofit_checkpoint(source, tmp_path / "made")
    assert shared_files(source, made) == []
    assert "Copying weights: 100%" in capfd.readouterr().err
    tensors = load_tensors(made)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_tensors(source).items())


def test_an_error_that_a_copy_would_meet_too_is_told(source, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        retrofit_checkpoint(source, tmp_path / "made")
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_saving_onto_the_destination_leaves_the_base_as_it_was(source, shard_size, tmp_path):
    # Also as root, whom permission bits would not stop: safetensors writes a new file and renames it.
    before = hashes(source)
    made = retrofit_checkpoint(source, tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(made)
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    model.save_pretrained(made, max_shard_size=shard_size)
    assert hashes(source) == before
    again = AutoModelForCausalLM.from_pretrained(made)
    assert same_tensors(again.state_dict(), model.state_dict())


def test_saving_onto_the_base_leaves_the_destination_as_it_was(source, tmp_path):
    made = retrofit_checkpoint(source, tmp_path / "made")
    before = hashes(made)
    base = LlamaForCausalLM.from_pretrained(source)
    for parameter in base.parameters():
        parameter.data.fill_(0.5)
    base.save_pretrained(source)
    assert hashes(made) == before


def test_the_destination_outlives_the_base(source, tmp_path):
    made = retrofit_checkpoint(source, tmp_path / "made")
    before = hashes(made)
    shutil.rmtree(source)
    assert hashes(made) == before
    AutoModelForCausalLM.from_pretrained(made)


def test_from_the_cache_of_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = make_cache(tmp_path / "cache", "someone/llama", source)
    before = hashes(cache)
    made = retrofit_checkpoint("someone/llama", tmp_path / "made", cache_dir=cache, local_files_only=True)
    # The files of the cache, and not its symbolic links, which break when it is cleared.
    assert not any(path.is_symlink() for path in made.iterdir())
    assert shared_files(cache / "models--someone--llama" / "blobs", made)
    assert hashes(cache) == before
    shutil.rmtree(cache)
    AutoModelForCausalLM.from_pretrained(made)


def make_cache(cache, repo, source):
    """The layout of huggingface_hub's cache."""
    repository = cache / f"models--{repo.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return cache
