"""``plan --fit`` against trying everything, and what it says where nothing fits."""

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest

from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.errors import UserError
from narrowgauge.engine.forecast.fit import Found, Search, fit, order
from narrowgauge.engine.forecast.hardware import GIB, RESERVED, Gpu
from narrowgauge.engine.forecast.machine import Machine
from narrowgauge.engine.forecast.whole_model import Traces
from narrowgauge.engine.run.validate import check_for

CONFIG: dict[str, Any] = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "vocab_size": 1000,
        }
    },
    "data": {"train": "stdlib", "vocab_size": 1000, "sequence_length": 256},
    "training": {"steps": 100},
    "logging": {"run_dir": "runs/fit"},
    "train_batch_size": 32,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000},
    "optimizer": {"type": "Grass", "params": {"lr": 0.005, "density": 0.25}},
    "activation_offload": {"path": ".", "min_tensor_bytes": 0},
}


def machine(free: float) -> Machine:
    """Four GPUs with so many bytes for a run."""
    return Machine(gpus=4, gpu=Gpu("small", RESERVED + free, 100e12, 1e12, 25e9))


DENSE = {**CONFIG, "optimizer": {"type": "AdamW", "params": {"lr": 0.005}}, "activation_offload": None}
MEGATRON = {**DENSE, "engine": "megatron", "zero_optimization": None}
KINDS = {"dense": DENSE, "grass": CONFIG, "megatron": MEGATRON}
# Of the model with each optimizer.
TRACES = {kind: Traces(of_many=True) for kind in KINDS}


def everything(kind: str) -> tuple[list[Found], Any]:
    """All choices, with each micro-batch, whether they fit or not; and the model."""
    config = load_config(KINDS[kind])
    _, described = check_for(config, 4)
    search = Search(config, described, machine(GIB), TRACES[kind])
    choices = (replace(c, micro=m) for c, m in itertools.product(search.choices(), search.micro_batches()))
    return [found for choice in choices if (found := search.tell(choice)) is not None], described


@pytest.mark.quick("dense-fastest-0.3")
@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("objective", ["fastest", "largest"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_what_trying_everything_finds(kind: str, objective: Any, share: float) -> None:
    tried, described = everything(kind)
    assert len(tried) == {"dense": 3 * 2 * 4, "grass": 3 * 4 * 5 * 4, "megatron": 2 * 4}[kind]
    peaks = sorted(found.forecast.peak.total for found in tried)
    room = peaks[int(share * len(peaks))]
    best = max((found for found in tried if found.forecast.peak.total <= room), key=order(objective))
    found = fit(load_config(KINDS[kind]), described, machine(room), objective, traces=TRACES[kind])
    assert order(objective)(found) == order(objective)(best)
    assert found.forecast.fits
    written = load_config(found.raw)
    assert written.batches(4).micro == found.choice.micro
    assert written.batches(4).total == 32


def test_where_nothing_fits() -> None:
    tried, described = everything("dense")
    least = min(found.forecast.peak.total for found in tried)
    with pytest.raises(UserError) as caught:
        fit(load_config(DENSE), described, machine(least - 1), "fastest", traces=TRACES["dense"])
    text = str(caught.value)
    assert "nothing fits 4 x small" in text
    assert "micro-batches of 1, " in text
    assert f"takes {least / GIB:.1f}" in text
    assert re.search(r"it fits (l4|a10|rtx3090|rtx4090)-24 or \d+ nodes$", text), text


def test_a_larger_micro_batch_follows_from_small_ones() -> None:
    """Memory of 8 sequences, told from two and three, and run through at its size."""
    config = load_config(DENSE)
    _, described = check_for(config, 4)
    traces = TRACES["dense"]
    told, found = traces.passes(config, described, 8), traces._traced(config, described, 8)
    assert told.saved == found.saved
    assert [stretch.backward for stretch in told.stretches] == [stretch.backward for stretch in found.stretches]
    assert told.flops == found.flops
