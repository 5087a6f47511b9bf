"""Step times, interleaved: all methods at the sweep's shape, and the main ones at a larger one."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import interleave, quartiles, ratios, show, write
from benchmarks.quality_data import Task, build_model
from benchmarks.quality_methods import METHODS
from benchmarks.step import build, method_stepper

MAIN = ("adamw", "grass-columns-1/8", "galore-torch-1/8")
_FILE = "times.json"


def time_methods(task: Task, methods: Sequence[str], *, rounds: int, folder: Path) -> None:
    """Time all methods on the sweep's model, for its report; the first is the baseline."""
    tokens = torch.randint(task.vocab, (task.batch, task.length))
    steps = {}
    for name in methods:
        model = build_model(task)
        steps[name], _ = method_stepper(METHODS[name], model, tokens.to(model.device))
    found = ratios(interleave(steps, rounds=rounds), methods[0])
    show(f"hidden {task.hidden}, {task.batch * task.length} tokens; without changes of subspace", found)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / _FILE, found, {"rounds": rounds, "task": task})


def read_times(folder: Path) -> dict[str, Any]:
    """What :func:`time_methods` wrote: by method and phase."""
    path = folder / _FILE
    return json.loads(path.read_text())["results"] if path.is_file() else {}


def compare_main(*, rounds: int, interval: int, small: bool, json: Path | None) -> None:
    """Print, for AdamW and for galore-torch as the baseline, the optimizer's step and the whole step at a larger
    shape, and what changes of subspace every ``interval`` steps add.
    """
    sizes = {"vocab": 512, "hidden": 64, "intermediate": 176, "layers": 1, "batch": 2, "length": 32}
    large = {"vocab": 4096, "hidden": 1024, "intermediate": 2736, "layers": 3, "batch": 8, "length": 128}
    shape = argparse.Namespace(**(sizes if small else large), dtype="float32")
    pairs = {}
    for name in MAIN:
        model = build(shape)
        tokens = torch.randint(shape.vocab, (shape.batch, shape.length)).to(model.device)
        pairs[name] = method_stepper(METHODS[name], model, tokens)
    phases = interleave({name: step for name, (step, _) in pairs.items()}, rounds=rounds)
    changes = interleave({name: refresh for name, (_, refresh) in pairs.items()}, rounds=3, warmup=0)
    whole = {}
    for name, own in phases.items():
        change = quartiles(changes[name].seconds["refresh"])[1] if changes[name].seconds else 0.0
        own.seconds["step and change"] = [seconds + change / interval for seconds in own.seconds["step"]]
        whole[name] = {"refresh": {"seconds_median": change}}
    title = f"hidden {shape.hidden}, {shape.layers} layers, {shape.batch * shape.length} tokens, {shape.dtype}"
    everything = {f"{name}, change of subspace": figures for name, figures in whole.items()}
    for baseline in (MAIN[0], MAIN[-1]):
        found = ratios(phases, baseline)
        show(f"{title}; against {baseline}; a change of subspace every {interval} steps", found)
        everything |= {f"{name} against {baseline}": figures for name, figures in found.items()}
    for name, figures in whole.items():
        print(f"{name}: a change of subspace takes {1e3 * figures['refresh']['seconds_median']:.1f} ms")
    if json is not None:
        write(json, everything, {**vars(shape), "rounds": rounds, "interval": interval})
