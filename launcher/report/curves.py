"""Which curves a report has, and their points."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .runs import Run

AXES = {"steps": "steps", "tokens": "million tokens", "time": "hours"}
_MIB = 2.0**20


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        name: what the legend calls it.
        run: number of the run, which gives the colour.
        style: number of the quantity among those of a chart, which gives the dashes.
        points: ``(x, y)``, in order.
    """

    name: str
    run: int
    style: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        marks: ``(x, run)`` of each time that a run went on after an interruption.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    marks: Sequence[tuple[float, int]] = ()


@dataclass(frozen=True)
class _Quantity:
    name: str
    path: str
    scale: float = 1.0


_OF_STEPS: Mapping[str, tuple[str, Sequence[_Quantity]]] = {
    "training loss": ("", [_Quantity("", "loss")]),
    "gradient norm": ("", [_Quantity("", "grad_norm")]),
    "learning rate": ("", [_Quantity("", "lr"), _Quantity("matrices", "lr_matrix")]),
    "tokens per second": ("", [_Quantity("", "tokens_per_second")]),
    "model FLOPs utilization": ("%", [_Quantity("", "mfu", 100.0)]),
    "time of a step": (
        "s",
        [
            _Quantity("whole", "seconds.step"),
            _Quantity("forward", "seconds.forward"),
            _Quantity("backward", "seconds.backward"),
            _Quantity("optimizer", "seconds.optimizer"),
            _Quantity("waiting for data", "seconds.data_wait"),
        ],
    ),
    "memory": ("MiB", [_Quantity("now", "memory.now", 1 / _MIB), _Quantity("highest so far", "memory.peak", 1 / _MIB)]),
    "traffic of a step": (
        "MiB",
        [_Quantity("reduced", "bytes.reduced", 1 / _MIB), _Quantity("gathered", "bytes.gathered", 1 / _MIB)],
    ),
    "saved activations": (
        "MiB",
        [
            _Quantity("saved", "bytes.saved_activations_peak", 1 / _MIB),
            _Quantity("of them in memory", "bytes.saved_activations_peak_resident", 1 / _MIB),
        ],
    ),
    "offload of a step": (
        "MiB",
        [_Quantity("written", "bytes.offload_written", 1 / _MIB), _Quantity("read", "bytes.offload_read", 1 / _MIB)],
    ),
    "waiting for the disk": ("s", [_Quantity("", "seconds.io_stall")]),
}


def charts_over(axis: str, runs: Sequence[Run]) -> list[Chart]:
    """All charts that any of the runs has points for.

    Args:
        axis: ``steps``, ``tokens`` or ``time``.
    """
    places = [_places(axis, run) for run in runs]
    marks = [
        (places[number](start.get("after_step", 0)), number)
        for number, run in enumerate(runs)
        for start in run.starts[1:]
    ]
    evaluations = [
        Curve(run.name, number, 0, _points(run.evaluations, "eval_loss", 1.0, places[number]))
        for number, run in enumerate(runs)
    ]
    found = [Chart("validation loss", "", [curve for curve in evaluations if curve.points], marks)]
    for title, (unit, quantities) in _OF_STEPS.items():
        curves = []
        for number, run in enumerate(runs):
            for style, quantity in enumerate(quantities):
                points = _points(run.records, quantity.path, quantity.scale, places[number])
                if points:
                    curves.append(Curve(_legend(run, quantity, runs), number, style, points))
        found.append(Chart(title, unit, curves, marks))
    # A quantity that is nought everywhere, as traffic on one process rank, tells nothing.
    shown = [chart for chart in found if any(y for curve in chart.curves for _, y in curve.points)]
    return sorted(shown, key=lambda chart: chart.title != "training loss")


def value_at(record: Mapping[str, Any], path: str) -> float | None:
    """The number at ``a.b``, or None."""
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _points(
    records: Sequence[dict[str, Any]], path: str, scale: float, place: Callable[[int], float]
) -> list[tuple[float, float]]:
    found = [(record["step"], value_at(record, path)) for record in records]
    return [(place(step), scale * value) for step, value in found if value is not None]


def _places(axis: str, run: Run) -> Callable[[int], float]:
    if axis == "steps":
        return float
    known = {0: 0.0, **(run.tokens() if axis == "tokens" else run.hours())}
    steps = sorted(known)

    def place(step: int) -> float:
        # Records may be some steps apart.
        return known[step] if step in known else known[max(each for each in steps if each <= step)]

    return place


def _legend(run: Run, quantity: _Quantity, runs: Sequence[Run]) -> str:
    parts = [run.name] if len(runs) > 1 or not quantity.name else []
    return ", ".join([*parts, *([quantity.name] if quantity.name else [])])
