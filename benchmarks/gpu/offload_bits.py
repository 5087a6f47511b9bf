"""Activation offload: gradients bit for bit."""

import os
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.offload import CASES, SMALL, settings
from benchmarks.gpu.stages import Emit
from benchmarks.offload_cases import KEEP, make_cases

_SIZES = {"layers": 4, "hidden": 1024, "batch": 4, "sequence": 512, "vocab": 4096, "dtype": "bfloat16"}
_STEPS = 3


def run(emit: Emit, *, small: bool) -> None:
    # Read by cuBLAS at its first use.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # Without it attention's backward adds in any order, and two steps without offload differ.
    torch.use_deterministic_algorithms(True)
    try:
        with tempfile.TemporaryDirectory(prefix="narrowgauge-gpu-") as folder:
            cases = make_cases(settings(Path(folder), **(SMALL if small else _SIZES)), CASES)
            expected = cases[KEEP].gradients()
            for name, case in cases.items():
                found = [case.gradients() for _ in range(1 if small else _STEPS)]
                same = all(torch.equal(a, b) for one in found for a, b in zip(one, expected, strict=True))
                emit(case=name, **{"same bits": same, "steps": len(found), "gradients": len(expected)})
                case.close()
    finally:
        torch.use_deterministic_algorithms(False)
