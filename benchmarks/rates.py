"""What schedules, a trust region, short sequences and ternary weights cost in loss: a small LLaMA, AdamW, on CPUs.

``python -m benchmarks.rates OUT.csv``: each method at the best of its own learning rates for seed 0, over three seeds.
"""

import argparse
import csv
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.quality_data import SMALL, Task, Text, build_model
from narrowgauge.engine.config.rate_blocks import ScheduleBlock
from narrowgauge.engine.run.lengths import Lengths
from narrowgauge.engine.run.schedule import rule_of
from narrowgauge.optimizers import TrustRegion
from narrowgauge.optimizers.layers.quantized_linear import quantize_linears
from narrowgauge.optimizers.layers.ternary_quantizer import TernaryQuantizer
from narrowgauge.optimizers.numerics.ternary import ScaleName
from narrowgauge.optimizers.trust_region import inner_rate

TASK = Task(
    hidden=128,
    intermediate=344,
    layers=2,
    vocab=2048,
    length=128,
    batch=4,
    steps=150,
    warmup_steps=15,
    eval_sequences=128,
)
_SEEDS = 3
_FULL = Lengths((), TASK.length)
_SHORT_FIRST = Lengths((((32, 64), 50), ((64, 128), 50)), TASK.length)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is changed about AdamW on a cosine.

    Attributes:
        rates: learning rates to try.
        schedule: as in ``training.lr_schedule``, without the warm-up.
        cycle: of a trust region.
        short_first: with the square root of the sequences as the batch rule.
        ternary: scale of ternary weights.
    """

    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    schedule: str = "cosine"
    cycle: int | None = None
    short_first: bool = False
    ternary: ScaleName | None = None


METHODS = {
    "adamw": Method(),
    "wsd": Method(schedule="wsd"),
    "power": Method(schedule="power", rates=(4e-3, 8e-3, 1.6e-2)),
    "trust-region-10": Method(cycle=10, rates=(4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "short-first": Method(short_first=True),
    "bitnet-mean": Method(ternary="mean"),
    "bitnet-median": Method(ternary="median"),
}


@dataclass(frozen=True)
class Result:
    loss: float
    step_seconds: float
    state_bytes: int


def train(method: Method, rate: float, task: Task, text: Text) -> Result:
    """Train once; ``loss`` is the validation's, at full length."""
    model = build_model(task)
    if method.ternary is not None:
        quantize_linears(model, None, partial(TernaryQuantizer, method.ternary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    block = ScheduleBlock.model_validate(
        {"type": method.schedule, "warmup_steps": task.warmup_steps, **_ends(method.schedule, task.steps)}
    )
    rule = rule_of(block, task.steps, tokens_per_step=task.batch * task.length, highest=rate)
    lengths = _SHORT_FIRST if method.short_first else _FULL
    cycle = method.cycle or 1
    schedule = LambdaLR(optimizer, lambda step: rule(step) * lengths.pieces(step) ** 0.5 * inner_rate(step, cycle))
    if method.cycle is not None:
        TrustRegion(optimizer, lambda: schedule.last_epoch, steps=method.cycle)
    seconds: list[float] = []
    for step, batch in enumerate(text.batches(task)):
        begin = time.perf_counter()
        tokens = lengths.cut(batch, step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - begin)
    state = sum(v.nbytes for values in optimizer.state.values() for v in values.values() if torch.is_tensor(v))
    return Result(_evaluate(model, text, task), statistics.median(seconds), state)


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
                "step_ratio": f"{statistics.median(r.step_seconds for r in results) / plain.step_seconds:.2f}",
                "state_ratio": f"{tried[best].state_bytes / plain.state_bytes:.2f}",
                "at_edge": "yes" if len(tried) > 1 and best in (min(tried), max(tried)) else "no",
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="seconds, for a test")
    arguments = parser.parse_args()
    task = dataclasses.replace(SMALL, length=128, steps=6) if arguments.small else TASK
    rows = compare(task, list(METHODS), 1 if arguments.small else _SEEDS)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
