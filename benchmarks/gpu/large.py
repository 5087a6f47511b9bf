"""One billion parameters in bf16."""

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.compare import Phases, interleave
from benchmarks.gpu.measure import allocated, peak_of, rows
from benchmarks.gpu.methods import COMPARED
from benchmarks.gpu.stages import ROOT, Emit
from benchmarks.step import build, method_stepper

_MODEL = ROOT / "configs" / "models" / "llama-1b.json"
_CASES = ("AdamW, fused", "Grass 1/8, fused")
_BATCH = 8


def _arguments(*, small: bool) -> Namespace:
    model = json.loads(_MODEL.read_text())
    shape = {
        "vocab": model["vocab_size"],
        "hidden": model["hidden_size"],
        "intermediate": model["intermediate_size"],
        "layers": model["num_hidden_layers"],
        "batch": _BATCH,
        "length": model["max_position_embeddings"],
    }
    tiny = {"vocab": 128, "hidden": 64, "intermediate": 171, "layers": 1, "batch": 2, "length": 16}
    return Namespace(**(tiny if small else shape), dtype="bfloat16")


def run(emit: Emit, *, small: bool) -> None:
    arguments = _arguments(small=small)
    tokens = torch.randint(arguments.vocab, (arguments.batch, arguments.length))

    def start(name: str) -> Callable[[Phases], None]:
        model: Any = build(arguments)
        step, _ = method_stepper(COMPARED[name], model, tokens.to(model.device))
        return step

    def measure_alone(name: str) -> dict[str, float | None]:
        step = start(name)
        for _ in range(2):
            step(Phases())
        return peak_of(lambda: step(Phases()))

    fit = []
    for name in _CASES:
        allocated()
        try:
            peaks: dict[str, Any] = {"fits": True, **measure_alone(name)}
            fit.append(name)
        except torch.cuda.OutOfMemoryError:
            peaks = {"fits": False}
        emit(case=f"{name}, alone", **peaks)
    if len(fit) < len(_CASES):
        return
    allocated()
    phases = interleave({name: start(name) for name in _CASES}, rounds=3 if small else 20, seconds=120.0)
    for name, figures in rows(phases, _CASES[0]).items():
        emit(case=name, **figures, **{"tokens/s": 1e3 * tokens.numel() / figures["step ms"]})
