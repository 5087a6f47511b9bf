"""The memory that a step takes with each optimizer, one at a time on the GPU."""

from benchmarks.compare import Phases
from benchmarks.gpu.measure import MIB, allocated, peak_of
from benchmarks.gpu.methods import COMPARED, start
from benchmarks.gpu.stages import Emit
from benchmarks.quality_methods import Method


def measure_alone(method: Method, *, small: bool) -> dict[str, float | None]:
    """The peak of a step after two others, and what weights and state take between steps."""
    step = start(method, small=small)
    for _ in range(2):
        step(Phases())
    peak = peak_of(lambda: step(Phases()))
    between = allocated()
    return {**peak, "between steps MiB": None if between is None else between / MIB}


def run(emit: Emit, *, small: bool) -> None:
    # Libraries take their workspaces at the first use, and keep them.
    measure_alone(COMPARED["AdamW"], small=small)
    base = None
    for name, method in COMPARED.items():
        before = allocated()
        figures = measure_alone(method, small=small)
        peak = figures["peak MiB"]
        base = base or peak
        emit(
            case=name,
            **figures,
            **{
                "peak ratio": peak / base if peak is not None and base is not None else None,
                "before MiB": None if before is None else before / MIB,
            },
        )
