"""One training run, and its result as a file."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import stored
from benchmarks.compare import machine
from benchmarks.quality_data import Task, Text, build_model
from benchmarks.quality_methods import METHODS, Shapes
from narrowgauge.engine.config.rate_blocks import ScheduleBlock
from narrowgauge.engine.run.schedule import rule_of

_FORMAT = 1
_RANKS = 2
_CLIP = 1.0


@dataclass(frozen=True)
class Rates:
    """Learning rate of the other parameters, of the matrices, and the second moment's beta."""

    lr: float
    matrix_lr: float
    beta2: float


@dataclass(frozen=True)
class Run:
    """All that a result depends on.

    Attributes:
        method: a name in ``METHODS``.
        text: fingerprint of the tokens.
    """

    method: str
    rates: Rates
    task: Task
    text: str

    def settings(self) -> dict[str, Any]:
        """As JSON, without what only the sweep looks at."""
        task = {key: value for key, value in asdict(self.task).items() if not key.startswith("grid_")}
        options = dict(METHODS[self.method].options)
        return {
            "format": _FORMAT,
            "method": self.method,
            "options": options,
            "rates": asdict(self.rates),
            "task": task,
            "text": self.text,
        }

    def path(self, folder: Path) -> Path:
        """Where the result is, or will be."""
        return stored.result_path(folder, self.method.replace("/", "_"), self.settings())


def read_result(run: Run, folder: Path) -> dict[str, Any] | None:
    return stored.read_result(run.path(folder))


def train(run: Run, text: Text, folder: Path) -> dict[str, Any]:
    """Train once and write the result; nothing is left of a run that does not end.

    A run whose loss is no longer finite ends there, with ``loss`` None.
    """
    result = {"settings": run.settings(), **_train(run, text), "machine": machine()}
    stored.write_result(run.path(folder), result)
    return result


def _train(run: Run, text: Text) -> dict[str, Any]:
    task, rates, method = run.task, run.rates, METHODS[run.method]
    model = build_model(task)
    shapes, weights, held = Shapes.of(model), _bytes(model.parameters()), _bytes(_held(model))
    optimizer = method.make(
        model,
        lr=rates.lr,
        matrix_lr_scale=rates.matrix_lr / rates.lr,
        betas=(0.9, rates.beta2),
        interval=task.interval,
        **method.options,
    )
    block = ScheduleBlock(type="cosine", warmup_steps=task.warmup_steps, decay_steps=None, min_lr_ratio=0.0)
    schedule = LambdaLR(optimizer, rule_of(block, task.steps))
    trained = [p for p in model.parameters() if p.requires_grad]
    seconds: dict[str, list[float]] = {"step": [], "optimizer": []}
    losses: dict[int, float | None] = {}
    evaluations = {task.steps * (i + 1) // task.num_evaluations for i in range(task.num_evaluations)}
    gradients = state = 0
    for step, batch in enumerate(text.batches(task), start=1):
        begin = time.perf_counter()
        tokens = batch.to(model.device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, _CLIP)
        gradients = _bytes(p.grad for p in model.parameters() if p.grad is not None)
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        finite = math.isfinite(float(loss.detach()))
        end = time.perf_counter()
        seconds["step"].append(end - begin)
        seconds["optimizer"].append(end - middle)
        schedule.step()
        if step == task.steps - 1:
            # Not after the last one: what observes the gradient for a change of subspace is there at that step alone.
            state = _bytes(_tensors(optimizer.state)) + _bytes(_held(model)) - held
        if step in evaluations or not finite:
            found = _evaluate(model, text, task) if finite else math.nan
            losses[step] = found if math.isfinite(found) else None
            if losses[step] is None:
                break
    extra = method.traffic(shapes, **method.options) / method.options.get("own_interval", task.interval)
    return {
        "loss": losses.get(task.steps),
        "losses": losses,
        "bytes": {
            "optimizer": state,
            "optimizer_formula": method.state(shapes, **method.options),
            "gradients": gradients,
            # What an optimizer adds to the model's weights: compact copies, adapters.
            "added_weights": _bytes(model.parameters()) - weights,
            "wire": 2 * (_RANKS - 1) / _RANKS * (gradients + extra),
        },
        "parameters": {"trained": sum(p.numel() for p in trained), "model": sum(shapes.dense) + _elements(shapes)},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
    }


@torch.no_grad()
def _evaluate(model: Any, text: Text, task: Task) -> float:
    """Mean loss per validation sample."""
    total, count = 0.0, 0
    model.eval()
    for batch in text.evaluation(task):
        tokens = batch.to(model.device)
        total += float(model(input_ids=tokens, labels=tokens).loss) * len(tokens)
        count += len(tokens)
    model.train()
    return total / count


def _elements(shapes: Shapes) -> int:
    return sum(m * n for m, n in shapes.matrices)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold beside parameters: buffers, and attributes such as a compact layer's index."""
    for module in model.modules():
        yield from (t for t in module._buffers.values() if t is not None)
        yield from (t for t in vars(module).values() if isinstance(t, Tensor))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside containers and plain objects (galore-torch keeps its projector as one)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
