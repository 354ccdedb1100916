"""Processes that run the command. Most start as a fork of one that has imported PyTorch and transformers already."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ENVIRONMENT = {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
IMPORTED = ["dynconv_cli.report", "dynconv_cli.generate", "dynconv_cli.doctor"]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTED)


class Run(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def dynconv(*arguments, cwd=None, **environment) -> Run:
    """`dynconv` with these arguments, in a terminal of 80 columns and without a network."""
    # huggingface_hub reads it when it is imported, by the process that the others are forks of.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as directory:
        outputs = [os.path.join(directory, name) for name in ("stdout", "stderr")]
        process = context.Process(
            target=_run, args=([*map(str, arguments)], *outputs, cwd, {**ENVIRONMENT, **environment})
        )
        process.start()
        process.join()
        return Run(process.exitcode, *(Path(output).read_text() for output in outputs))


def _run(arguments: list[str], stdout: str, stderr: str, cwd: str | None, environment: dict[str, str]) -> None:
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    # Those that the process began with may have been closed or replaced.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = ["dynconv", *arguments]

    from dynconv_cli import main

    main()
