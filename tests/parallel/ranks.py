"""Two processes that stay up between tests: starting one takes longer than any of these tests."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Ranks:
    """Runs a function on every rank of a gloo process group on the CPU."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[multiprocessing.Process] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable, *args: Any, timeout: float = 90) -> list[Any]:
        """What `function(*args)` returned on each rank; fails with the traceback of the rank that failed first."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.size:
            ready = multiprocessing.connection.wait(
                [pipe for rank, pipe in enumerate(self._pipes) if rank not in results], deadline - time.monotonic()
            )
            if not ready:
                self._fail(f"ranks {sorted(set(range(self.size)) - set(results))} still ran after {timeout} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    error, results[rank] = pipe.recv()
                except EOFError:
                    self._fail(f"rank {rank} died")
                if error is not None:
                    self._fail(f"rank {rank}:\n{error}")
        return [results[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """Ends the processes. The others may wait for one that failed, so none is asked."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _fail(self, reason: str) -> None:
        self.stop()
        raise AssertionError(reason)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
        for rank in range(self.size):
            pipe, child_pipe = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, rendezvous, child_pipe), daemon=True)
            process.start()
            # The parent must not keep this end open: it would never see the child die.
            child_pipe.close()
            self._processes.append(process)
            self._pipes.append(pipe)


def _serve(rank: int, size: int, rendezvous: Path, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((None, function(*args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
