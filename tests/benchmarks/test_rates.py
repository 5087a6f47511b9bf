"""The benchmark of schedules, trust region, lengths and ternary weights, in small."""

import dataclasses

import pytest

from benchmarks.quality_data import SMALL, Text
from benchmarks.rates import METHODS, train


@pytest.mark.slow
def test_every_method_trains_and_the_anchor_is_counted() -> None:
    task = dataclasses.replace(SMALL, length=128, steps=6)
    text = Text(task)
    found = {name: train(method, method.rates[0], task, text) for name, method in METHODS.items()}
    assert len({result.loss for result in found.values()}) == len(METHODS)
    plain, held = (found[name].state_bytes for name in ("adamw", "trust-region-10"))
    # Two moments, and the anchor.
    assert held == pytest.approx(1.5 * plain, rel=1e-3)
