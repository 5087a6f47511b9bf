"""Process ranks with Megatron for tests: four forks of the server of :mod:`tests.support.forked`, in a gloo group of as
many as a call asks for.
"""

import gc
import importlib
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from tests.support.gloo import share_device
from tests.support.ranks import Forks, answers

SIZE = 4
_TIMEOUT = 240.0
# Of a rank, beyond which its next call is a new process's: each process group that something still holds has two.
_MOST_THREADS = 120


class MegatronPool(Forks):
    """Runs functions of modules on 1 to :data:`SIZE` ranks. A call that raises or hangs on any ends all of them, and
    the next call starts new ones.
    """

    def run(self, function: Callable[..., Any], *args: Any, ranks: int = SIZE, **kwargs: Any) -> list[Any]:
        """Call a module-level function on this many ranks; returns what each returned, in rank order."""
        if not self._processes:
            self._fork(SIZE, _serve)
        rendezvous = tempfile.mktemp(prefix="narrowgauge-megatron-")  # noqa: S306 (the store makes the file)
        for pipe in self._pipes[:ranks]:
            pipe.send((function.__module__, function.__qualname__, args, kwargs, ranks, rendezvous))
        results = answers(self._pipes[:ranks], self._receive, self.close, seconds=_TIMEOUT)
        with suppress(OSError):
            os.unlink(rendezvous)
        if any(_num_threads(process.pid) > _MOST_THREADS for process in self._processes):
            self.close()
        return results


def _num_threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _serve(rank: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from narrowgauge.engine.backends.megatron import cpu

    warnings.simplefilter("ignore")
    cpu.install()
    torch.set_num_threads(1)
    share_device()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    while True:
        try:
            module, name, args, kwargs, size, rendezvous = pipe.recv()
        except EOFError:
            return
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
            function = getattr(importlib.import_module(module), name)
            found = function(*args, **kwargs)
            _leave()
            pipe.send((False, found))
        except BaseException:
            pipe.send((True, traceback.format_exc()))


def _leave() -> None:
    import torch.distributed as dist

    from narrowgauge.engine.backends.megatron.groups import destroy_groups

    destroy_groups()
    dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        from narrowgauge.engine.backends.deepspeed.privates import release_destroyed_groups

        release_destroyed_groups()
        _count_from_the_start()
    # Each group that something unreachable still holds has threads.
    gc.collect()


def _count_from_the_start() -> None:
    """DeepSpeed numbers a process's modules at ZeRO-3 and compares the numbers of all ranks; not all of the ranks here
    take part in each call.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0  # pyright: ignore[reportOptionalSubscript]
    Init.param_id = 0
