"""What may be at the destination, and what becomes of it."""

import os
from importlib import import_module

import pytest

from dynconv_hf import retrofit_checkpoint

from .checkpoints import hashes, save_llama


@pytest.fixture
def source(tmp_path):
    return save_llama(tmp_path / "base")


def test_parents_are_made(source, tmp_path):
    assert retrofit_checkpoint(source, tmp_path / "a" / "b" / "made") == tmp_path / "a" / "b" / "made"


def test_relative_paths(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert retrofit_checkpoint("base", "made") == tmp_path / "made"
    assert (tmp_path / "made" / "config.json").exists()


def test_an_existing_destination_is_refused(source, tmp_path):
    made = retrofit_checkpoint(source, tmp_path / "made")
    before = hashes(made)
    with pytest.raises(FileExistsError, match=r"destination exists; overwrite=True replaces it: .*made"):
        retrofit_checkpoint(source, made)
    assert hashes(made) == before


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_a_checkpoint_as_a_whole(exchange, source, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr("dynconv_hf.atomic_directory._exchange", lambda one, other: False)
    made = retrofit_checkpoint(source, tmp_path / "made", conv_rank=3)
    (made / "tokenizer.json").write_text("of the old one")
    retrofit_checkpoint(source, made, overwrite=True, conv_rank=5)
    expected = retrofit_checkpoint(source, tmp_path / "expected", conv_rank=5)
    assert hashes(made).keys() == hashes(expected).keys()
    assert hashes(made)["config.json"] == hashes(expected)["config.json"]
    assert sorted(os.listdir(tmp_path)) == ["base", "expected", "made"]


def test_overwrite_with_nothing_there(source, tmp_path):
    retrofit_checkpoint(source, tmp_path / "made", overwrite=True)
    (tmp_path / "empty").mkdir()
    retrofit_checkpoint(source, tmp_path / "empty", overwrite=True)


def test_a_failed_overwrite_keeps_the_old_one(source, tmp_path, monkeypatch):
    made = retrofit_checkpoint(source, tmp_path / "made")
    before = hashes(made)

    def fail(*_):
        raise OSError("no more")

    monkeypatch.setattr(import_module("dynconv_hf.retrofit_checkpoint"), "_link_or_copy", fail)
    with pytest.raises(OSError, match="no more"):
        retrofit_checkpoint(source, made, overwrite=True)
    assert hashes(made) == before
    assert sorted(os.listdir(tmp_path)) == ["base", "made"]


def make_notes(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def make_checkpoint_with_notes(path):
    save_llama(path)
    (path / "runs").mkdir()
    (path / "runs" / "notes").write_text("mine")


def make_json_only(path):
    path.mkdir()
    (path / "config.json").write_text('{"mine": 1}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("mine"), "only a directory can be overwritten"),
        (lambda path: path.symlink_to("base"), "only a directory can be overwritten"),
        (make_notes, r"replaces checkpoints and nothing else.*notes\.txt"),
        (make_checkpoint_with_notes, "replaces checkpoints and nothing else.*runs/notes"),
        (make_json_only, r"has no config\.json of a model"),
    ],
    ids=["file", "link", "directory", "checkpoint with more", "another config"],
)
def test_what_is_no_checkpoint_is_never_deleted(make, message, source, tmp_path):
    make(tmp_path / "made")
    before = hashes(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=message if overwrite else "destination exists"):
            retrofit_checkpoint(source, tmp_path / "made", overwrite=overwrite)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("destination", ["base", "base/made", "."])
def test_source_and_destination_must_lie_apart(destination, source, tmp_path):
    before = hashes(tmp_path)
    with pytest.raises((ValueError, FileExistsError), match=r"must lie apart|nothing else"):
        retrofit_checkpoint(source, tmp_path / destination, overwrite=True)
    assert hashes(tmp_path) == before
