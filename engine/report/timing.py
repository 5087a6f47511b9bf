"""Seconds spent in named phases, of a step or of a benchmark."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Times named phases; on CUDA by events on the current stream, so that measuring does not make the host wait and a
    phase within another delays neither.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._samples: dict[str, list[float]] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            begin_time = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - begin_time)

    def samples(self) -> dict[str, list[float]]:
        """The seconds of each time a phase was entered since the last call, by name; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1000)
        samples, self._samples, self._events = self._samples, {}, []
        return samples

    def collect(self) -> dict[str, float]:
        """The seconds in each phase since the last call, added up; waits for the device."""
        return {name: sum(seconds) for name, seconds in self.samples().items()}

    def _add(self, name: str, seconds: float) -> None:
        self._samples.setdefault(name, []).append(seconds)
