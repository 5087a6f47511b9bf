"""A whole step of a LLaMA with Grass, phase by phase."""

from argparse import Namespace

from benchmarks.compare import interleave
from benchmarks.gpu.measure import rows
from benchmarks.gpu.stages import Emit
from benchmarks.step import stepper

_SMALL = {"vocab": 128, "hidden": 64, "intermediate": 96, "layers": 1, "batch": 2, "length": 16}
# LLaMA's of 350M.
_SIZES = {"vocab": 32000, "hidden": 1024, "intermediate": 2736, "layers": 24, "batch": 8, "length": 1024}


def shape(*, small: bool) -> Namespace:
    """Of the model and batch, for ``benchmarks.step``."""
    return Namespace(**(_SMALL if small else _SIZES), density=1 / 8, dtype="bfloat16")


def run(emit: Emit, *, small: bool) -> None:
    arguments = shape(small=small)
    alternatives = {
        "AdamW": stepper(arguments),
        "columns, uniform": stepper(arguments, side="columns"),
        "columns, block": stepper(arguments, side="columns", selection="block"),
        "columns, siblings": stepper(arguments, side="columns", shared_inputs="siblings"),
        "rows, uniform": stepper(arguments, side="rows"),
    }
    phases = interleave(alternatives, rounds=3 if small else 20, seconds=90.0)
    refresh = {name: own.seconds.pop("refresh", []) for name, own in phases.items()}
    for name, figures in rows(phases, "AdamW").items():
        times = sorted(refresh[name])
        emit(case=name, **figures, **{"refresh ms": 1e3 * times[len(times) // 2] if times else None})
