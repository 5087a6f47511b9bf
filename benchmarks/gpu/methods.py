"""A step with each optimizer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare import Phases, interleave
from benchmarks.gpu.measure import allocated, rows
from benchmarks.gpu.stages import Emit
from benchmarks.gpu.steps import shape
from benchmarks.quality_methods import METHODS, Method
from benchmarks.step import build, method_stepper


def _fused_adamw(model: torch.nn.Module, *, interval: int, **options: Any) -> torch.optim.Optimizer:
    adamw = METHODS["adamw"].make(model, interval=interval, **options)
    return torch.optim.AdamW(adamw.param_groups, fused=True)


def _with(name: str, **options: Any) -> Method:
    return replace(METHODS[name], options={**METHODS[name].options, **options})


COMPARED: dict[str, Method] = {
    "AdamW": METHODS["adamw"],
    "AdamW, fused": replace(METHODS["adamw"], make=_fused_adamw),
    "Grass 1/8": METHODS["grass-columns-1/8"],
    "Grass 1/8, fused": _with("grass-columns-1/8", fused=True),
    "GaLore 1/8": METHODS["galore-1/8"],
    "Frugal 1/4": METHODS["frugal-1/4"],
    "Apollo 1/4": METHODS["apollo-1/4"],
    "Apollo-Mini": METHODS["apollo-mini"],
}


def start(method: Method, *, small: bool, **options: int) -> Callable[[Phases], None]:
    """A closure that takes a step of a fresh model; ``options`` as of ``method_stepper``."""
    arguments = shape(small=small)
    model: Any = build(arguments)
    tokens: Tensor = torch.randint(arguments.vocab, (arguments.batch, arguments.length)).to(model.device)
    return method_stepper(method, model, tokens, **options)[0]


def run(emit: Emit, *, small: bool) -> None:
    steps = {name: start(method, small=small) for name, method in COMPARED.items()}
    figures = rows(interleave(steps, rounds=3 if small else 15, seconds=90.0), "AdamW")
    steps.clear()
    for name, method in COMPARED.items():
        allocated()
        if name.startswith("AdamW"):
            emit(case=name, **figures[name])
            continue
        changing = interleave({name: start(method, small=small, interval=1)}, rounds=3, warmup=1)
        found = rows(changing, name)[name]
        emit(case=name, **figures[name], **{"step with change of subspace ms": found["step ms"]})
