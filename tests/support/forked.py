"""Commands in forks of one process that has imported PyTorch, DeepSpeed and narrowgauge: imports are most of what a
short command costs.

A fork has arguments, environment, working directory and streams of its own, and its process ranks meet as those of
``torchrun`` do. What it lacks is the start of an interpreter and a launcher; tests of these use
:mod:`tests.support.command`. What libraries read from the environment while they are imported was read before, and
``/proc/PID/environ`` shows what the server was started with.
"""

import atexit
import contextlib
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.command import ROOT, environment, free_port

_SECONDS_TO_END = 30.0


def server() -> Any:
    """Multiprocessing's context whose processes are forks of one that has imported what tests need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded", "tests.support.forked"])
    return context


class Forked:
    """``python WORDS`` on one or several process ranks, which end as under ``torchrun``: with the first that fails."""

    def __init__(self, words: Sequence[str], *, ranks: int, cwd: Path, extra: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="narrowgauge-forked-")
        self._streams = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        context, common = server(), environment(**extra)
        if ranks > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self._processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            arguments = (list(words), {**common, **own}, str(cwd), [str(path) for path in self._streams])
            # One that a failed test has left ends with pytest.
            process = context.Process(target=_become, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """The process ids, in the order of the ranks."""
        return [process.pid for process in self._processes]

    @property
    def exit_codes(self) -> list[int | None]:
        """Of each rank; None while it runs."""
        return [process.exitcode for process in self._processes]

    def poll(self) -> int | None:
        """The exit code, once all have ended; of several 0 or 1."""
        codes = [process.exitcode for process in self._processes]
        failed = [code for code in codes if code]
        if failed and None in codes:
            self._end()
            codes = [process.exitcode for process in self._processes]
        if None in codes:
            return None
        return codes[0] if len(codes) == 1 else int(any(codes))

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"did not end within {timeout} s; it said {self.said()}")
            time.sleep(0.01)
        return code

    def said(self) -> tuple[str, str]:
        """What is on standard output and standard error so far."""
        out, err = (path.read_text() if path.exists() else "" for path in self._streams)
        return out, err

    def kill(self) -> None:
        """SIGKILL to all ranks and what they have started."""
        family = []
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                member = psutil.Process(process.pid)
                family += [member, *member.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=30)

    def _end(self) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + _SECONDS_TO_END
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()
        for process in self._processes:
            process.join()


def start(*words: str, ranks: int = 1, **extra: str) -> Forked:
    """Start ``narrowgauge WORDS`` and return at once."""
    return Forked(["-m", "narrowgauge.launcher", *words], ranks=ranks, cwd=ROOT, extra=extra)


def run(*words: str, ranks: int = 1, **extra: str) -> "subprocess.CompletedProcess[str]":
    """Run ``narrowgauge WORDS`` to the end."""
    return _finished(start(*words, ranks=ranks, **extra), words)


def python(*words: str, ranks: int = 1, cwd: Path = ROOT, **extra: str) -> "subprocess.CompletedProcess[str]":
    """Run ``python WORDS`` to the end, where WORDS begin with ``-m MODULE``, ``-c CODE`` or a file."""
    return _finished(Forked(words, ranks=ranks, cwd=cwd, extra=extra), words)


def _finished(process: Forked, words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    code = process.wait(600)
    return subprocess.CompletedProcess(words, code, *process.said())


def _become(words: list[str], environ: dict[str, str], cwd: str, streams: list[str]) -> None:
    """In the fork: what the interpreter does between its start and its end."""
    for target, path in enumerate(streams, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, target)
        os.close(file)
    # A daemon of multiprocessing could not start data workers.
    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.path[:0] = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(write_through=True)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
