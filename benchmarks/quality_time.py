"""Step times at a larger shape, interleaved: AdamW, Grass and galore-torch, each at density or rank 1/8."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import Phases, interleave, quartiles, ratios, show, write
from benchmarks.quality_methods import METHODS
from benchmarks.step import build

_NAMES = ("adamw", "grass-columns-1/8", "galore-torch-1/8")
# No change of subspace falls into a timed step: it is timed by itself.
_NEVER = 1 << 30


def _shape(small: bool) -> argparse.Namespace:
    sizes = {"vocab": 512, "hidden": 64, "intermediate": 176, "layers": 1, "batch": 2, "length": 32}
    large = {"vocab": 4096, "hidden": 1024, "intermediate": 2736, "layers": 3, "batch": 8, "length": 128}
    return argparse.Namespace(**(sizes if small else large), dtype="float32")


def _stepper(name: str, shape: argparse.Namespace) -> tuple[Callable[[Phases], None], Callable[[Phases], None]]:
    """Closures that take one step of a fresh model, and that change its subspace once."""
    model, method = build(shape), METHODS[name]
    optimizer: Any = method.make(
        model, lr=1e-3, matrix_lr_scale=0.1, betas=(0.9, 0.999), interval=_NEVER, **method.options
    )
    tokens = torch.randint(shape.vocab, (shape.batch, shape.length)).to(model.device)

    def step(phases: Phases) -> None:
        with phases.phase("step"):
            model(input_ids=tokens, labels=tokens).loss.backward()
            with phases.phase("optimizer"):
                optimizer.step()
            optimizer.zero_grad()

    def refresh(phases: Phases) -> None:
        if hasattr(optimizer, "refresh"):
            with phases.phase("refresh"):
                optimizer.refresh()
        elif name.startswith("galore-torch"):
            model(input_ids=tokens, labels=tokens).loss.backward()
            with phases.phase("refresh"):
                for parameter, state in optimizer.state.items():
                    if "projector" in state:
                        # It decomposes the gradient at the steps that its gap divides.
                        state["projector"].project(parameter.grad, 0)
            optimizer.zero_grad()

    return step, refresh


def compare_times(*, rounds: int, interval: int, small: bool, json: Path | None) -> None:
    """Print, for AdamW and for galore-torch as the baseline, the optimizer's step and the whole step."""
    shape = _shape(small)
    pairs = {name: _stepper(name, shape) for name in _NAMES}
    phases = interleave({name: step for name, (step, _) in pairs.items()}, rounds=rounds)
    title = f"hidden {shape.hidden}, {shape.layers} layers, {shape.batch * shape.length} tokens, {shape.dtype}"
    everything = {}
    for baseline in ("adamw", "galore-torch-1/8"):
        found = ratios(phases, baseline)
        show(f"{title}; against {baseline}, without changes of subspace", found)
        everything |= {f"{name} against {baseline}": figures for name, figures in found.items()}
    for name, (_, refresh) in pairs.items():
        measured = Phases()
        for _ in range(3):
            refresh(measured)
        if "refresh" in measured.seconds:
            seconds = quartiles(measured.seconds["refresh"])[1]
            share = 100 * seconds / interval / quartiles(phases[name].seconds["step"])[1]
            print(f"{name}: a change of subspace takes {1e3 * seconds:.1f} ms, {share:.2f} % of {interval} steps")
            everything[f"{name}, change of subspace"] = {"refresh": {"seconds_median": seconds}}
    if json is not None:
        write(json, everything, {**vars(shape), "rounds": rounds, "interval": interval})
