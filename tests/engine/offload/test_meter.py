"""What a summary says of activation offload."""

from pathlib import Path
from typing import Any

import torch

from narrowgauge.engine.offload.meter import OffloadMeter, summarize_offload
from narrowgauge.offload import ActivationOffload
from tests.offload.support import GatedBackend, new_offload, rest, settle

LAYERS, NBYTES = 20, 40_000


def step(offload: ActivationOffload, backend: GatedBackend, *, is_slow: bool) -> None:
    """Saves :data:`LAYERS` tensors; nothing is written before the last one of them where the disk is slow."""
    rest(offload)
    if is_slow:
        backend.gate.clear()
    x = torch.ones(NBYTES // 4, requires_grad=True)
    with offload:
        h = x
        for _ in range(LAYERS):
            h = (h * 1.25).sin()
            if not is_slow:
                settle(offload)
    backend.gate.set()
    settle(offload)
    h.sum().backward()


def test_peaks_are_of_steps_under_the_plan(tmp_path: Path) -> None:
    """The first step keeps all that it saves until it is written: that says nothing of the steps after it."""
    backend = GatedBackend()
    offload = new_offload(tmp_path, backend=backend, keep_resident=0.5)
    meter = OffloadMeter(offload)
    records: list[dict[str, Any]] = []
    for number in range(4):
        step(offload, backend, is_slow=number == 0)
        moved, seconds = meter.step()
        records.append({"bytes": moved, "seconds": seconds})
    found = summarize_offload(records, offload)["bytes"]
    offload.close()
    first, *planned = (record["bytes"] for record in records)
    everything = LAYERS * NBYTES
    assert first["saved_activations_peak"] == first["saved_activations_peak_resident"] == everything
    assert [record["offload_budget"] for record in planned] == [everything // 2] * 3
    # Half of it stays, and beside it there are buffers: a tenth of it, or three of its tensors.
    assert found["saved_activations_peak"] == everything
    assert everything // 2 <= found["saved_activations_peak_resident"] <= everything // 2 + 4 * (NBYTES + 4096)
    assert found["offload_written"] >= (everything + 3 * everything // 2) // 4
