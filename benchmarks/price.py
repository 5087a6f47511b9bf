"""What schedules, a trust region, short sequences, ternary weights and ways to save memory cost in loss and time: a
small LLaMA on CPUs.

``python -m benchmarks.price OUT.csv``: each method at the best of its own learning rates for the matrices inside of the
blocks with seed 0, over three seeds; the other parameters have one rate in all.
"""

import argparse
import csv
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.quality_data import SMALL, WIDE, Task, Text, build_model
from benchmarks.quality_methods import groups_of
from benchmarks.saved import Saved
from narrowgauge.engine.config.rate_blocks import ScheduleBlock
from narrowgauge.engine.run.lengths import Lengths
from narrowgauge.engine.run.schedule import rule_of
from narrowgauge.offload import ActivationOffload
from narrowgauge.optimizers import Grass, TrustRegion
from narrowgauge.optimizers.layers.quantized_linear import quantize_linears
from narrowgauge.optimizers.layers.sampled_linear import sample_linears
from narrowgauge.optimizers.layers.sampling import Rad, Sampler, WtaCrs
from narrowgauge.optimizers.layers.ternary_quantizer import TernaryQuantizer
from narrowgauge.optimizers.numerics.ternary import ScaleName
from narrowgauge.optimizers.trust_region import inner_rate

TASK = dataclasses.replace(WIDE, batch=4, steps=150, warmup_steps=15, eval_sequences=128)
_SEEDS = 3
_OTHERS_RATE = 1e-2
_FULL = Lengths((), TASK.length)
_SHORT_FIRST = Lengths((((32, 64), 50), ((64, 128), 50)), TASK.length)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is changed about AdamW on a cosine.

    Attributes:
        rates: of the matrices, to try.
        schedule: as in ``training.lr_schedule``, without the warm-up.
        cycle: of a trust region.
        short_first: with the square root of the sequences as the batch rule.
        ternary: scale of ternary weights.
        sampler: of the linear layers' inputs.
        density: of Grass's columns, in AdamW's stead.
        codec: of saved tensors.
        to_disk: they go there, all of them.
        recompute: layers keep their inputs only.
    """

    rates: tuple[float, ...] = (1.25e-4, 2.5e-4, 5e-4, 1e-3)
    schedule: str = "cosine"
    cycle: int | None = None
    short_first: bool = False
    ternary: ScaleName | None = None
    sampler: Callable[[], Sampler] | None = None
    density: float | None = None
    codec: str | None = None
    to_disk: bool = False
    recompute: bool = False


_COLUMNS: dict[str, Any] = {"density": 1 / 8, "rates": (1e-3, 2e-3, 4e-3)}
_TERNARY: dict[str, Any] = {"rates": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)}
_SAMPLED = partial(WtaCrs, 0.3)
METHODS = {
    "adamw": Method(),
    "wsd": Method(schedule="wsd"),
    "power": Method(schedule="power"),
    "trust-region-10": Method(cycle=10, rates=(5e-4, 1e-3, 2e-3)),
    "short-first": Method(short_first=True),
    "bitnet-mean": Method(**_TERNARY, ternary="mean"),
    "bitnet-median": Method(**_TERNARY, ternary="median"),
    "recompute": Method(recompute=True),
    "disk": Method(to_disk=True),
    "mesa8": Method(codec="mesa8"),
    "wta-crs-0.3": Method(sampler=_SAMPLED),
    "wta-crs-0.1": Method(sampler=partial(WtaCrs, 0.1)),
    "rad-0.5": Method(sampler=partial(Rad, 0.5)),
    "columns-1/8": Method(**_COLUMNS),
    "columns-1/8+wta-crs-0.3": Method(**_COLUMNS, sampler=_SAMPLED),
    "columns-1/8+mesa8": Method(**_COLUMNS, codec="mesa8"),
    "columns-1/8+wta-crs-0.3+mesa8+disk": Method(**_COLUMNS, sampler=_SAMPLED, codec="mesa8", to_disk=True),
}


@dataclass(frozen=True)
class Result:
    loss: float
    state_bytes: int
    saved_bytes: int


def train(method: Method, rate: float, task: Task, text: Text) -> Result:
    """Train once; ``loss`` is the validation's, at full length; ``saved_bytes`` are in memory between the forward and
    the backward of one micro-batch, parameters aside.
    """
    with tempfile.TemporaryDirectory(prefix="narrowgauge-price-") as folder:
        run = _Run(method, rate, task, folder)
        for batch in text.batches(task):
            run.step(batch)
        found = Result(run.evaluate(text), run.state_bytes(), run.saved_bytes(next(iter(text.batches(task)))))
        run.close()
        return found


def step_ratios(names: Sequence[str], task: Task, text: Text, rounds: int) -> dict[str, float]:
    """The median time of a step against the first method's in the same round; all take turns."""
    with tempfile.TemporaryDirectory(prefix="narrowgauge-price-") as folder:
        runs = {name: _Run(METHODS[name], METHODS[name].rates[0], task, folder) for name in names}
        batch, ratios = next(iter(text.batches(task))), {name: [] for name in names}
        for number in range(rounds + 2):
            seconds = {}
            for name, run in runs.items():
                begin = time.perf_counter()
                run.step(batch)
                seconds[name] = time.perf_counter() - begin
            # The first steps make what the later ones use.
            for name in names if number >= 2 else ():
                ratios[name].append(seconds[name] / seconds[names[0]])
        for run in runs.values():
            run.close()
    return {name: statistics.median(found) for name, found in ratios.items()}


class _Run:
    def __init__(self, method: Method, rate: float, task: Task, folder: str) -> None:
        self.method, self.task, self._number = method, task, 0
        model: Any = build_model(task)
        if method.recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if method.sampler is not None:
            sample_linears(model, None, method.sampler)
        if method.ternary is not None:
            quantize_linears(model, None, partial(TernaryQuantizer, method.ternary))
        self.model, self.optimizer, self.offload = model, _optimizer(method, rate, task, model), None
        if method.codec is not None or method.to_disk:
            options: dict[str, Any] = {"min_tensor_bytes": 1}
            options |= {"codec": method.codec} if method.codec else {}
            options |= {"keep_resident": 0.0} if method.to_disk else {}
            self.offload = ActivationOffload(folder if method.to_disk else None, model=model, **options)
        block = ScheduleBlock.model_validate(
            {"type": method.schedule, "warmup_steps": task.warmup_steps, **_ends(method.schedule, task.steps)}
        )
        rule = rule_of(block, task.steps, tokens_per_step=task.batch * task.length, highest=_OTHERS_RATE)
        self.lengths = lengths = _SHORT_FIRST if method.short_first else _FULL
        cycle = method.cycle or 1
        self.schedule = LambdaLR(
            self.optimizer, lambda step: rule(step) * lengths.pieces(step) ** 0.5 * inner_rate(step, cycle)
        )
        if method.cycle is not None:
            TrustRegion(self.optimizer, lambda: self.schedule.last_epoch, steps=method.cycle)

    def step(self, batch: Tensor) -> None:
        tokens = self.lengths.cut(batch, self._number)
        with self.offload or nullcontext():
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self._number += 1

    def evaluate(self, text: Text) -> float:
        loss = _evaluate(self.model, text, self.task)
        self.model.train()
        return loss

    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        return sum(v.nbytes for values in states for v in values.values() if torch.is_tensor(v))

    def saved_bytes(self, tokens: Tensor) -> int:
        return _saved_bytes(self.model, tokens, self.offload, recomputes=self.method.recompute)

    def close(self) -> None:
        if self.offload is not None:
            self.offload.close()


def _optimizer(method: Method, rate: float, task: Task, model: nn.Module) -> torch.optim.Optimizer:
    if method.density is not None:
        return Grass(
            model,
            lr=_OTHERS_RATE,
            matrix_lr_scale=rate / _OTHERS_RATE,
            density=method.density,
            refresh_interval=task.interval,
            weight_decay=0.01,
            decay="all",
        )
    groups = groups_of(model, _OTHERS_RATE, rate / _OTHERS_RATE)
    return torch.optim.AdamW(groups, weight_decay=0.01)


def _saved_bytes(model: Any, tokens: Tensor, offload: ActivationOffload | None, *, recomputes: bool) -> int:
    """Of the storages that a forward leaves in memory for backward, each once, without parameters."""
    if offload is not None:
        with offload:
            loss = model(input_ids=tokens, labels=tokens).loss
        while offload.debug_state().writes_pending or offload.debug_state().lanes_busy:
            time.sleep(0.001)
        resident = offload.stats().resident
        del loss
        return resident
    count = Saved(model)

    def keep_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        count.pack(inputs[0])

    # Checkpointing's own hooks are inside of ours: what it keeps are the layers' inputs.
    layers = model.model.layers if recomputes else ()
    handles = [layer.register_forward_pre_hook(keep_input) for layer in layers]
    with saved_tensors_hooks(count.pack, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens)
    for handle in handles:
        handle.remove()
    return count.nbytes


def _ends(schedule: str, steps: int) -> dict[str, int]:
    return {"decay_steps": steps // 5} if schedule in ("wsd", "power") else {}


@torch.no_grad()
def _evaluate(model: nn.Module, text: Text, task: Task) -> float:
    model.eval()
    losses = [(float(model(input_ids=batch, labels=batch).loss), len(batch)) for batch in text.evaluation(task)]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def compare(task: Task, names: Sequence[str], seeds: int) -> list[dict[str, str]]:
    """A row for each method."""
    text, rows, plain = Text(task), [], None
    steps = step_ratios(names, task, text, rounds=20 if seeds > 1 else 1)
    for name in names:
        method = METHODS[name]
        tried = {rate: train(method, rate, task, text) for rate in method.rates}
        best = min(tried, key=lambda rate: tried[rate].loss)
        others = [train(method, best, dataclasses.replace(task, seed=seed), text) for seed in range(1, seeds)]
        results = [tried[best], *others]
        losses = [result.loss for result in results]
        plain = plain or tried[best]
        rows.append(
            {
                "method": name,
                "lr": f"{best:g}",
                "loss_mean": f"{statistics.fmean(losses):.4f}",
                "loss_low": f"{min(losses):.4f}",
                "loss_high": f"{max(losses):.4f}",
                "step_ratio": f"{steps[name]:.2f}",
                "state_ratio": f"{tried[best].state_bytes / plain.state_bytes:.2f}",
                "saved_ratio": f"{tried[best].saved_bytes / plain.saved_bytes:.3f}",
                "at_edge": "yes" if len(tried) > 1 and best in (min(tried), max(tried)) else "no",
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="seconds, for a test")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="the first is compared with")
    arguments = parser.parse_args()
    task = dataclasses.replace(SMALL, length=128, steps=6) if arguments.small else TASK
    rows = compare(task, arguments.only, 1 if arguments.small else _SEEDS)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
