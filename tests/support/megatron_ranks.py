"""Process ranks with Megatron for tests: four forks of one import, in a gloo group of as many as a call asks for."""

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from tests.support.ranks import answers

SIZE = 4
_TIMEOUT = 240.0
# Of a rank, beyond which its next call is a new process's: three a process group, each waking a hundred times a second.
_MOST_THREADS = 120


class MegatronPool:
    """Runs functions of modules on 1 to :data:`SIZE` ranks. A call that raises or hangs on any ends all of them, and
    the next call starts new ones.
    """

    def __init__(self) -> None:
        self._server: Any = None
        self._pipes: list[Connection] = []
        self._pids: list[int] = []

    def run(self, function: Callable[..., Any], *args: Any, ranks: int = SIZE, **kwargs: Any) -> list[Any]:
        """Call a module-level function on this many ranks; returns what each returned, in rank order."""
        if self._server is None:
            self._start()
        rendezvous = tempfile.mktemp(prefix="narrowgauge-megatron-")  # noqa: S306 (the store makes the file)
        for pipe in self._pipes[:ranks]:
            pipe.send((function.__module__, function.__qualname__, args, kwargs, ranks, rendezvous))
        results = answers(self._pipes[:ranks], self._receive, self.close, seconds=_TIMEOUT)
        with suppress(OSError):
            os.unlink(rendezvous)
        if any(_num_threads(pid) > _MOST_THREADS for pid in self._pids):
            self.close()
        return results

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._pipes[rank].recv()
        except EOFError:
            return True, "the process died"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        mine, others = zip(*(context.Pipe() for _ in range(SIZE)), strict=True)
        told, telling = context.Pipe()
        self._server = context.Process(target=_serve_all, args=(others, telling))
        self._server.start()
        for other in others:
            other.close()
        self._pids, self._pipes = told.recv(), list(mine)

    def close(self) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pipe in self._pipes:
            pipe.close()
        if self._server is not None:
            self._server.join()
        self._server, self._pipes, self._pids = None, [], []


def _num_threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _serve_all(pipes: tuple[Connection, ...], telling: Connection) -> None:
    """Import Megatron, and be forked into the ranks."""
    import megatron.core  # noqa: F401  # pyright: ignore[reportMissingImports]

    from narrowgauge.engine.backends.megatron import cpu

    cpu.install()
    for family in ("llama", "mixtral"):
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for name in ("model", "masters", "training", "construct", "build", "zero.build"):
        with suppress(ImportError):
            importlib.import_module(f"narrowgauge.engine.backends.megatron.{name}")
    gc.collect()
    gc.freeze()  # as in tests/support/preloaded.py
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_serve, args=(rank, pipes)) for rank in range(len(pipes))]
    for process in processes:
        process.start()
    telling.send([process.pid for process in processes])
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join()


def _serve(rank: int, pipes: tuple[Connection, ...]) -> None:
    import torch
    import torch.distributed as dist

    for other, pipe in enumerate(pipes):
        if other != rank:
            pipe.close()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    while True:
        try:
            module, name, args, kwargs, size, rendezvous = pipes[rank].recv()
        except EOFError:
            return
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
            function = getattr(importlib.import_module(module), name)
            found = function(*args, **kwargs)
            _leave()
            pipes[rank].send((False, found))
        except BaseException:
            pipes[rank].send((True, traceback.format_exc()))


def _leave() -> None:
    import torch.distributed as dist

    from narrowgauge.engine.backends.megatron.groups import destroy_groups

    destroy_groups()
    dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        from narrowgauge.engine.backends.deepspeed.privates import release_destroyed_groups

        release_destroyed_groups()
        _count_from_the_start()
    # Each group that something unreachable still holds has three threads that wake a hundred times a second.
    gc.collect()


def _count_from_the_start() -> None:
    """DeepSpeed numbers a process's modules at ZeRO-3 and compares the numbers of all ranks; not all of the ranks here
    take part in each call.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0  # pyright: ignore[reportOptionalSubscript]
    Init.param_id = 0
