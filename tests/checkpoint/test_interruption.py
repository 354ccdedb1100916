"""Killed at any moment, a run leaves nothing or the whole, and the next one clears up after it."""

import errno
import multiprocessing
import os
import random
import subprocess
import time
from importlib import import_module

import pytest

from dynconv_hf import atomic_directory, retrofit_checkpoint

from .checkpoints import hashes, retrofit_with_seed, save_llama

KILLS = 10


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    # Imported once: each process then starts in an instant, and time is spent in what is to be interrupted.
    context.set_forkserver_preload(["tests.checkpoint.checkpoints"])
    return context


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    # Some tenths of a second to copy.
    return save_llama(
        tmp_path_factory.mktemp("source") / "base", shard_size="4MB", vocab_size=2**15, hidden_size=128, head_dim=8
    )


def start(processes, source, destination, **kwargs):
    arguments = {"copy": True, "conv_init": "uniform", **kwargs}
    process = processes.Process(target=retrofit_with_seed, args=(source, destination), kwargs=arguments)
    process.start()
    return process


def run_time(processes, source, destination, **kwargs):
    start(processes, source, destination, **kwargs).join()
    # The first process waits for the imports.
    started = time.perf_counter()
    process = start(processes, source, destination, overwrite=True, **kwargs)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - started


def kill_sometime(process, longest):
    time.sleep(random.uniform(0, longest))
    process.kill()
    process.join()


def test_a_new_destination(processes, source, tmp_path):
    before = hashes(source)
    longest = run_time(processes, source, tmp_path / "whole" / "made")
    whole = hashes(tmp_path / "whole" / "made")
    destination = tmp_path / "made"
    for _ in range(KILLS):
        kill_sometime(start(processes, source, destination), longest)
        if destination.exists():
            assert hashes(destination) == whole
            destination.rename(tmp_path / f"made-{time.monotonic_ns()}")
        assert all("made" in name for name in os.listdir(tmp_path) if name != "whole")
    assert hashes(source) == before
    # Whatever the last one left.
    start(processes, source, destination).join()
    assert hashes(destination) == whole
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_an_overwritten_destination(exchange, processes, source, tmp_path, monkeypatch):
    before = hashes(source)
    destination = tmp_path / "made"
    target = retrofit_with_seed if exchange else retrofit_without_exchange
    longest = run_time(processes, source, tmp_path / "whole" / "made")
    wholes = {}
    for seed in (0, 1):
        retrofit_with_seed(source, tmp_path / f"seed{seed}" / "made", seed, copy=True, conv_init="uniform")
        wholes[seed] = hashes(tmp_path / f"seed{seed}" / "made")
    retrofit_with_seed(source, destination, 0, copy=True, conv_init="uniform")
    for kill in range(KILLS):
        arguments = {"copy": True, "conv_init": "uniform", "overwrite": True}
        process = processes.Process(target=target, args=(source, destination, kill % 2), kwargs=arguments)
        process.start()
        kill_sometime(process, longest)
        if not destination.exists():
            # Between two renames; the next run brings it back.
            assert not exchange
            assert hashes(tmp_path / ".made.dynconv-replaced") in wholes.values()
        else:
            assert hashes(destination) in wholes.values()
    retrofit_with_seed(source, destination, 1, copy=True, conv_init="uniform", overwrite=True)
    assert hashes(destination) == wholes[1]
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
    assert hashes(source) == before


def retrofit_without_exchange(*args, **kwargs):
    """As on systems that cannot swap two directories."""
    atomic_directory._exchange = lambda one, other: False
    retrofit_with_seed(*args, **kwargs)


def test_killed_between_the_two_renames(tmp_path):
    source = save_llama(tmp_path / "base")
    made = retrofit_checkpoint(source, tmp_path / "made")
    before = hashes(made)
    made.rename(tmp_path / ".made.dynconv-replaced")
    (tmp_path / ".made.dynconv-incomplete").mkdir()
    with pytest.raises(FileExistsError, match="destination exists"):
        retrofit_checkpoint(source, made)
    assert hashes(made) == before
    assert sorted(os.listdir(tmp_path)) == ["base", "made"]


def test_a_failing_second_rename_brings_the_old_one_back(tmp_path, monkeypatch):
    source = save_llama(tmp_path / "base")
    made = retrofit_checkpoint(source, tmp_path / "made")
    before = hashes(made)
    monkeypatch.setattr(atomic_directory, "_exchange", lambda one, other: False)
    rename = atomic_directory.Path.rename

    def refuse(path, target):
        if path.name.endswith("incomplete"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(atomic_directory.Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        retrofit_checkpoint(source, made, overwrite=True, conv_rank=3)
    assert hashes(made) == before
    assert sorted(os.listdir(tmp_path)) == ["base", "made"]


def test_an_error_leaves_nothing(tmp_path, monkeypatch):
    source = save_llama(tmp_path / "base")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("dynconv_hf.retrofit_checkpoint"), "_link_or_copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        retrofit_checkpoint(source, tmp_path / "made")
    assert os.listdir(tmp_path) == ["base"]


def test_two_at_once(tmp_path, monkeypatch):
    source = save_llama(tmp_path / "base")
    destination = tmp_path / "made"

    with atomic_directory.new_directory(destination, check_replaceable=lambda path: None) as staging:
        (staging / "file").write_text("first")
        with pytest.raises(BlockingIOError, match="another process is writing this destination"):
            retrofit_checkpoint(source, destination)
    assert hashes(destination).keys() == {"file"}


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "options", [{"vocab_size": 2**15}, {"conv_rank": 2**12}], ids=["weights of the base", "convolutions"]
)
def test_a_full_disk(options, small_disk, tmp_path):
    conv = {key: options[key] for key in options if key.startswith("conv_")}
    source = save_llama(tmp_path / "base", **{key: options[key] for key in options if key not in conv})
    with pytest.raises(OSError) as caught:
        retrofit_checkpoint(source, small_disk / "made", **conv)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_disk) == []
