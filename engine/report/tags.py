"""The names of a record's numbers in TensorBoard, wandb and trackio, in groups: ``train/``, ``eval/``, ``perf/``,
``memory/``, ``offload/`` and ``traffic/``. Light to import.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = {
    "eval_loss": "eval/loss",
    "tokens_per_second": "perf/tokens_per_second",
    "mfu": "perf/mfu",
    "memory.now": "memory/now",
    "memory.peak": "memory/peak",
    "bytes.reduced": "traffic/reduced",
    "bytes.gathered": "traffic/gathered",
    "bytes.saved_activations_peak": "offload/saved_peak",
    "bytes.saved_activations_peak_resident": "offload/resident_peak",
    "bytes.offload_written": "offload/written",
    "bytes.offload_read": "offload/read",
    "bytes.offload_budget": "offload/budget",
    "seconds.io_stall": "offload/seconds_waited",
}
_NOT_SHOWN = ("step", "time")
# First what a run is for.
LAYOUT = {
    "loss": {
        "loss": ["Multiline", ["train/loss", "eval/loss"]],
        "perplexity": ["Multiline", ["train/perplexity", "eval/perplexity"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "learning rates": ["Multiline", ["train/lr", "train/lr_matrix"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["perf/tokens_per_second"]],
        "seconds": ["Multiline", [f"perf/seconds_{name}" for name in ("step", "forward", "backward", "optimizer")]],
    },
    "bytes": {
        "memory": ["Multiline", ["memory/now", "memory/peak"]],
        "offload": ["Multiline", ["offload/saved_peak", "offload/resident_peak"]],
        "traffic": ["Multiline", ["traffic/reduced", "traffic/gathered"]],
    },
}
"""TensorBoard's custom scalars."""


def tagged(values: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers by tag, with the perplexities that follow from its losses."""
    found = {}
    for path, value in _flat(values):
        if path not in _NOT_SHOWN:
            tag = _tag(path)
            found[tag] = value
            if tag in ("train/loss", "eval/loss"):
                found[tag.replace("loss", "perplexity")] = perplexity(value)
    return found


def perplexity(loss: float) -> float:
    """``exp(loss)``; infinite where that is beyond all numbers."""
    return math.exp(loss) if loss < 700 else math.inf


def _tag(path: str) -> str:
    if path in _NAMES:
        return _NAMES[path]
    block, _, rest = path.partition(".")
    if block == "seconds":
        return f"perf/seconds_{rest}"
    return f"train/{path.replace('.', '/')}"


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif isinstance(value, int | float):
            yield name, float(value)
