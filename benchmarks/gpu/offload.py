"""Activation offload to RAM and to disk, against keeping, recomputing and ``save_on_cpu``: time and memory."""

import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import Phases
from benchmarks.gpu.measure import MIB, rows
from benchmarks.gpu.stages import Emit
from benchmarks.offload_cases import KEEP, LAYER_INPUTS, RECOMPUTE, make_cases

CASES = (KEEP, "save_on_cpu", "pinned memory", "offload everything", "adaptive", RECOMPUTE, LAYER_INPUTS)
# Small tensors are not offloaded: these are just large enough.
SMALL = {"layers": 2, "hidden": 256, "batch": 2, "sequence": 128, "vocab": 256, "dtype": "float32"}
_SIZES = {"layers": 8, "hidden": 2048, "batch": 4, "sequence": 1024, "vocab": 32000, "dtype": "bfloat16"}
# The adaptive plan is made in the first steps.
_WARMUP, _ROUNDS = 6, 6


def settings(path: Path, **sizes: Any) -> Namespace:
    """For ``benchmarks.offload_cases``; everything else is the offload's default."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "threads" if sizes == SMALL else "auto"
    return Namespace(path=path, device=device, backend=backend, lanes=None, buffer_mib=0, **sizes)


def run(emit: Emit, *, small: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="narrowgauge-gpu-") as folder:
        _compare(emit, Path(folder), rounds=1 if small else _ROUNDS, **(SMALL if small else _SIZES))


def _compare(emit: Emit, folder: Path, *, rounds: int, **sizes: Any) -> None:
    cases = make_cases(settings(folder, **sizes), CASES)
    for case in cases.values():
        for _ in range(_WARMUP if case.offload is not None and case.name == "adaptive" else 2):
            case.step()
        case.seen.clear()
    phases = {name: Phases() for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            for phase, seconds in case.step().seconds.items():
                phases[name].seconds.setdefault(phase, []).extend(seconds)
    times = rows(phases, KEEP)
    cuda = torch.cuda.is_available()
    for name, case in cases.items():
        seen = {key: statistics.median(values) for key, values in case.seen.items()}
        stats = case.offload.stats() if case.offload is not None else None
        emit(
            case=name,
            **times[name],
            **{
                "peak MiB": max(case.seen["resident"]) / MIB if cuda else None,
                "waited ms": 1e3 * seen["stall"] if "stall" in seen else None,
                "written MiB": seen["written"] / MIB if "written" in seen else None,
                "read MiB": seen["read"] / MIB if "read" in seen else None,
                "not written": stats.failed_writes + stats.full if stats is not None else None,
                "write GB/s": stats.write_bandwidth / 1e9 if stats is not None else None,
                "read GB/s": stats.read_bandwidth / 1e9 if stats is not None else None,
                "I/O": stats.backend if stats is not None else None,
            },
        )
        case.close()
