"""The benchmark of what methods cost in loss and time, in small."""

import dataclasses

import pytest

from benchmarks.price import METHODS, train
from benchmarks.quality_data import SMALL, Text


@pytest.mark.slow
def test_every_method_trains_and_the_anchor_is_counted() -> None:
    task = dataclasses.replace(SMALL, length=128, steps=6)
    text = Text(task)
    found = {name: train(method, method.rates[0], task, text) for name, method in METHODS.items()}
    # Recomputation and the disk change no digit.
    assert found["recompute"].loss == found["disk"].loss == found["adamw"].loss
    assert len({result.loss for result in found.values()}) == len(METHODS) - 2
    saved = {name: result.saved_bytes / found["adamw"].saved_bytes for name, result in found.items()}
    assert saved["columns-1/8+wta-crs-0.3+mesa8+disk"] == saved["disk"] == 0
    assert saved["recompute"] < saved["mesa8"] < 0.6
    assert saved["columns-1/8+mesa8"] < saved["columns-1/8"] < 1
    assert saved["wta-crs-0.1"] < saved["wta-crs-0.3"] < 0.95
    plain, held = (found[name].state_bytes for name in ("adamw", "trust-region-10"))
    # Two moments, and the anchor.
    assert held == pytest.approx(1.5 * plain, rel=1e-3)
