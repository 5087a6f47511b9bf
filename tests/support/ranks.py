"""Real process ranks for tests: a few processes in one gloo group, kept for many calls.

Importing PyTorch and DeepSpeed takes seconds; a test's work is often less. The server of :mod:`tests.support.forked`
has imported them, and every rank is a fork of it. A call that raises or hangs on any rank ends all of them, and the
next call starts new ones.
"""

import importlib
import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from tests.support.forked import server

_TIMEOUT = 480.0


class Forks:
    """Process ranks that are forks of the server of :mod:`tests.support.forked`, each at the other end of a pipe."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _fork(self, size: int, serve: Callable[..., None], *args: Any) -> None:
        """Start ``serve(rank, *args, pipe)`` for each rank."""
        context = server()
        for rank in range(size):
            own, other = context.Pipe()
            process = context.Process(target=serve, args=(rank, *args, other), daemon=True)
            process.start()
            other.close()
            self._processes.append(process)
            self._pipes.append(own)

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._pipes[rank].recv()
        except EOFError:
            return True, f"the process died with exit code {self._processes[rank].exitcode}"

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


class RankPool(Forks):
    """``world_size`` processes that run the same function, each as its rank of one gloo group."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self._world_size = world_size
        self._port: socket.socket | None = None

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call a module-level function on all ranks; returns what each returned, in rank order."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args, kwargs))
        return answers(self._pipes, self._receive, self.close, seconds=_TIMEOUT)

    def _start(self) -> None:
        rendezvous = tempfile.mktemp(prefix="narrowgauge-ranks-")  # noqa: S306 (the store makes the file)
        # Kept: no other pool of the machine gets its port.
        self._port = socket.socket()
        self._port.bind(("127.0.0.1", 0))
        self._fork(self._world_size, _serve, self._world_size, rendezvous, self._port.getsockname()[1])

    def close(self) -> None:
        super().close()
        if self._port is not None:
            self._port.close()


def answers(
    pipes: Sequence[Connection],
    receive: Callable[[int], tuple[bool, Any]],
    close: Callable[[], None],
    *,
    seconds: float,
) -> list[Any]:
    """What the ranks at the other ends return, in rank order; the first that fails, or the time, ends all of them.

    Args:
        receive: whether a rank failed, and what it sent.
    """
    results: list[Any] = [None] * len(pipes)
    waiting, deadline = set(range(len(pipes))), time.monotonic() + seconds
    while waiting:
        for rank in sorted(waiting):
            if pipes[rank].poll(0.01):
                failed, value = receive(rank)
                if failed:
                    close()
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = value
                waiting.discard(rank)
        if time.monotonic() > deadline:
            close()
            raise AssertionError(f"ranks {sorted(waiting)} did not return within {seconds} s")
    return results


def _serve(rank: int, world_size: int, rendezvous: str, port: int, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    # The group is made from a file; DeepSpeed names its shared memory after these, which must differ between pools.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    deepspeed.init_distributed("gloo", verbose=False)
    while True:
        try:
            module, name, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            function = getattr(importlib.import_module(module), name)
            pipe.send((False, function(*args, **kwargs)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
