"""Ends a process rank that has stopped getting anywhere, with the stacks of its threads and the name of who is behind.

A rank that hangs, a host that is cut off and a collective that never returns look the same from within: nothing is
finished any more. All ranks pass the same places in the same order, so whoever has passed the fewest is the one that
the others wait for.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import write_json
from .environment import process_rank, world_size
from .exit_codes import EXIT_HUNG

STACKS = "stacks"
# Seconds that the ranks have to write where they are before one of them compares, and that a rank whose interpreter is
# blocked is left beyond the limit.
_PATIENCE = 3.0


class Watchdog:
    """Watches from a thread of its own, while it is entered.

    Args:
        limit: seconds without a :meth:`beat` after which the process ends; None does not watch.
        run_dir: stacks go to its folder ``stacks``.
    """

    def __init__(self, limit: float | None, run_dir: Path) -> None:
        self._limit, self._folder = limit or 0.0, run_dir / STACKS
        self._beats, self._place, self._at = 0, "start", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="narrowgauge-watchdog", daemon=True)
        self._file: Any = None

    def __enter__(self) -> "Watchdog":
        if not self._limit:
            return self
        self._folder.mkdir(parents=True, exist_ok=True)
        # Of an earlier try.
        self._report_path(process_rank()).unlink(missing_ok=True)
        self._file = self._stacks_path().open("w")
        self.beat("start")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        # An empty file that stays does no harm; its folder's failure would hide why the run ends.
        with suppress(OSError):
            self._stacks_path().unlink()

    def beat(self, place: str) -> None:
        """Something was finished; ``place`` is what comes next."""
        self._beats, self._place, self._at = self._beats + 1, place, time.monotonic()
        if self._file is not None:
            # Needs no interpreter lock, so that it also ends a rank that is stuck with it.
            faulthandler.dump_traceback_later(self._limit + 2 * _PATIENCE, file=self._file, exit=True)

    def _stacks_path(self) -> Path:
        return self._folder / f"rank-{process_rank()}-{socket.gethostname()}-{os.getpid()}.txt"

    def _report_path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._limit / 10)):
            if time.monotonic() - self._at > self._limit:
                self._end()

    def _end(self) -> None:
        rank, host = process_rank(), socket.gethostname()
        message = f"no progress for {self._limit:g} s at {self._place}; stacks in {self._stacks_path()}"
        self._say(f"error: process rank {rank} on {host}: {message}")
        # What hangs may be the disk that the stacks go to.
        end = threading.Timer(3 * _PATIENCE, os._exit, (EXIT_HUNG,))
        end.daemon = True
        end.start()
        try:
            faulthandler.dump_traceback(file=self._file)
            self._file.flush()
            report = {"rank": rank, "host": host, "beats": self._beats, "place": self._place}
            write_json(self._report_path(rank), report)
            time.sleep(_PATIENCE)
            self._say(f"error: process rank {rank} on {host}: {self._diagnosis()}")
        finally:
            os._exit(EXIT_HUNG)

    def _diagnosis(self) -> str:
        reports = []
        for rank in range(world_size()):
            try:
                reports.append(json.loads(self._report_path(rank).read_text()))
            except (OSError, ValueError):
                continue
        silent = sorted(set(range(world_size())) - {report["rank"] for report in reports})
        if silent:
            names = ", ".join(map(str, silent))
            return f"no word of process rank {names}: gone or stopped, or still within the limit"
        fewest = min(report["beats"] for report in reports)
        behind = [report for report in reports if report["beats"] == fewest]
        if len(behind) == len(reports):
            return f"all process ranks are at {self._place}: a collective does not return"
        return "behind the others: " + ", ".join(f"rank {r['rank']} on {r['host']} at {r['place']}" for r in behind)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201
