"""Runs a sweep: what the search asks for, several runs at a time, each result in a file of its own."""

import fcntl
import math
import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_data import Task, Text
from benchmarks.quality_methods import METHODS
from benchmarks.quality_run import Rates, Run, read_result, train
from benchmarks.quality_search import Progress, search_baseline, search_only, search_rates

BASELINE = "adamw"


class Search:
    """The state of the sweep, as the result files tell it.

    Attributes:
        repeats: of each method at its best rates, with other seeds.
        matrix_lr: the only rates of the matrices that are tried, but for AdamW's own; empty for a search.
    """

    def __init__(
        self, task: Task, text: str, folder: Path, *, repeats: int = 0, matrix_lr: Sequence[float] = ()
    ) -> None:
        self.task, self.text, self.folder, self.repeats = task, text, folder, repeats
        self.matrix_lr = matrix_lr
        self._known: dict[Path, float] = {}

    def run(self, method: str, rates: Rates) -> Run:
        return Run(method, rates, self.task, self.text)

    def repeated(self, method: str, rates: Rates) -> list[Run]:
        """The runs at these rates with other seeds."""
        tasks = [replace(self.task, seed=self.task.seed + 1 + number) for number in range(self.repeats)]
        return [Run(method, rates, task, self.text) for task in tasks]

    def loss_of(self, run: Run) -> float | None:
        """The loss of a run: None if it was not made, infinity if training diverged."""
        path = run.path(self.folder)
        if path not in self._known:
            result = read_result(run, self.folder)
            if result is None:
                return None
            self._known[path] = math.inf if result["loss"] is None else result["loss"]
        return self._known[path]

    def progress(self, method: str) -> Progress:
        """What ``method`` still needs, or its best rates; neither while AdamW's are not known."""
        baseline = search_baseline(
            lambda rates: self.loss_of(self.run(BASELINE, rates)), self.task.grid_lr, self.task.grid_matrix_lr
        )
        if method == BASELINE or baseline.best is None:
            return baseline if method == BASELINE else Progress()
        start = replace(baseline.best, matrix_lr=baseline.best.matrix_lr * METHODS[method].start)
        of_matrices, of_others = METHODS[method].trains_matrices, len(self.task.grid_lr) > 1

        def losses(rates: Rates) -> float | None:
            return self.loss_of(self.run(method, rates))

        if self.matrix_lr and of_matrices:
            return search_only(losses, start, self.matrix_lr)
        return search_rates(losses, start, of_matrices=of_matrices, of_others=of_others)

    def missing(self, methods: Sequence[str]) -> list[Run]:
        """The runs that are needed next, in the order of the methods; repetitions last."""
        found, repetitions = [], []
        for method in methods:
            progress = self.progress(method)
            found += [self.run(method, rates) for rates in progress.missing]
            if progress.best is not None:
                repetitions += [r for r in self.repeated(method, progress.best) if self.loss_of(r) is None]
        return found + repetitions


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one sweep at a time works in a folder.

    Raises:
        SystemExit: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another sweep is running in {folder}") from None
        yield


@dataclass
class Sweep:
    """Runs what is missing until nothing is.

    Attributes:
        jobs: runs at a time, each in a process of its own; 1 runs them in this one.
        threads: of each run.
        failed: methods of which a run ended with an error; they are not tried again.
    """

    search: Search
    methods: Sequence[str]
    jobs: int
    threads: int
    failed: set[str] = field(default_factory=set)

    def execute(self) -> int:
        """Run everything; returns how many runs were made."""
        count = 0
        with locked(self.search.folder):
            for run, begin in self._alone() if self.jobs == 1 else self._side_by_side():
                count += self._finish(run, time.time() - begin)
        return count

    def _next(self, running: Sequence[Run] = ()) -> Run | None:
        methods = [method for method in self.methods if method not in self.failed]
        return next((run for run in self.search.missing(methods) if run not in running), None)

    def _alone(self) -> Iterator[tuple[Run, float]]:
        torch.set_num_threads(self.threads)
        text = Text(self.search.task)
        while (run := self._next()) is not None:
            begin = time.time()
            try:
                train(run, text, self.search.folder)
            except Exception:
                traceback.print_exc()
            yield run, begin

    def _side_by_side(self) -> Iterator[tuple[Run, float]]:
        running: dict[Run, tuple[SpawnProcess, float]] = {}
        try:
            while True:
                while len(running) < self.jobs and (run := self._next(list(running))) is not None:
                    process = multiprocessing.get_context("spawn").Process(
                        target=_work, args=(run, self.search.folder, self.threads), daemon=True
                    )
                    process.start()
                    running[run] = process, time.time()
                if not running:
                    return
                wait([process.sentinel for process, _ in running.values()])
                for run, (process, begin) in list(running.items()):
                    if not process.is_alive():
                        del running[run]
                        yield run, begin
        finally:
            for process, _ in running.values():
                process.terminate()

    def _finish(self, run: Run, seconds: float) -> bool:
        result = read_result(run, self.search.folder)
        if result is None:
            self.failed.add(run.method)
        outcome = "failed, the method is left out" if result is None else _describe(result)
        rates = run.rates
        print(
            f"{time.strftime('%H:%M:%S')} {run.method}: lr {rates.lr:.3g}, matrices {rates.matrix_lr:.3g},"
            f" beta2 {rates.beta2}, seed {run.task.seed}: {outcome} ({seconds:.0f} s)",
            flush=True,
        )
        return result is not None


def _describe(result: dict[str, Any]) -> str:
    return "diverged" if result["loss"] is None else f"loss {result['loss']:.4f}"


def _work(run: Run, folder: Path, threads: int) -> None:
    # Ctrl-C reaches the whole group; the parent ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    train(run, Text(run.task), folder)
