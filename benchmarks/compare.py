"""Interleaved timing of alternatives, as medians, spread and ratios to the first."""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from narrowgauge.engine.report.timing import PhaseTimer


class Phases:
    """Collects the seconds of named phases, one list each; they are in ``seconds`` after :meth:`settle`."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._timer = PhaseTimer()

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self._timer.phase(name)

    def settle(self) -> None:
        """Wait for the GPU, where there is one, and read its times."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for name, seconds in self._timer.samples().items():
            self.seconds.setdefault(name, []).extend(seconds)


def interleave(
    alternatives: dict[str, Callable[[Phases], None]], *, rounds: int, warmup: int = 2, seconds: float = math.inf
) -> dict[str, Phases]:
    """Run every alternative once per round, in turn, so that a slow moment of the machine meets all of them.

    Args:
        seconds: no further round begins after so many, once three were counted.
    """
    phases = {name: Phases() for name in alternatives}
    started = time.perf_counter()
    for number in range(rounds + warmup):
        if number >= warmup + 3 and time.perf_counter() - started > seconds:
            break
        for name, run in alternatives.items():
            own = phases[name] if number >= warmup else Phases()
            run(own)
            own.settle()
    return phases


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return low, middle, high


def ratios(phases: dict[str, Phases], baseline: str) -> dict[str, dict[str, Any]]:
    """For each alternative and phase: median seconds, and the ratio to the baseline of the same round."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in phases.items():
        for phase, seconds in own.seconds.items():
            base = phases[baseline].seconds[phase]
            low, middle, high = quartiles([a / b for a, b in zip(seconds, base, strict=True)])
            found.setdefault(name, {})[phase] = {
                "seconds_median": statistics.median(seconds),
                "ratio": middle,
                "ratio_quartiles": [low, high],
            }
    return found


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    """Print a table of median seconds and, of the ratio to the baseline, median and quartiles."""
    # Not above: the figures themselves are also taken where it is not installed.
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    phases = list(next(iter(found.values())))
    for phase in phases:
        table.add_column(phase, justify="right")
    for name, figures in found.items():
        cells = []
        for phase in phases:
            low, high = figures[phase]["ratio_quartiles"]
            milliseconds, ratio = 1e3 * figures[phase]["seconds_median"], figures[phase]["ratio"]
            cells.append(f"{milliseconds:.1f} ms  {ratio:.3f}x ({low:.3f}-{high:.3f})")
        table.add_row(name, *cells)
    Console(width=24 + 34 * len(phases)).print(table)


def write(path: Path, found: dict[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the figures as JSON, with the machine and the settings they belong to."""
    settings = {key: str(value) for key, value in settings.items()}
    path.write_text(json.dumps({"machine": machine(), "settings": settings, "results": found}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
