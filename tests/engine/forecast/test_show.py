"""What ``plan`` prints at eighty columns."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.forecast.forecast import forecast
from narrowgauge.engine.forecast.hardware import GIB, gpu_named
from narrowgauge.engine.forecast.machine import Machine
from narrowgauge.engine.forecast.show import figure, show
from narrowgauge.engine.run.validate import check_for

STAGES = 8
CONFIG: dict[str, Any] = {
    "engine": "megatron",
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": STAGES,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        }
    },
    "data": {"train": "stdlib", "vocab_size": 32768, "sequence_length": 128},
    "training": {"steps": 100},
    "logging": {"run_dir": "runs/show"},
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "megatron": {"pipeline_parallel": STAGES},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.005}},
}


@pytest.mark.parametrize(
    ("value", "places", "shown"),
    [(0.0, 1, "0.0"), (1234.56, 1, "1,234.6"), (0.00123, 3, "0.0012"), (0.4, 0, "0.40"), (12.0, 0, "12")],
)
def test_small_numbers_keep_their_digits(value: float, places: int, shown: str) -> None:
    assert figure(value, places) == shown


@pytest.mark.slow
def test_all_stages_of_a_long_pipeline_are_readable() -> None:
    config, machine = load_config(CONFIG), Machine(gpus=STAGES, gpu=gpu_named("h100-80"))
    _, described = check_for(config, STAGES)
    found, text = forecast(config, described, world_size=STAGES, machine=machine), io.StringIO()
    show(found, Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    tables = [line for line in lines if line.startswith("│ all ")]
    assert len(tables) == 4
    totals = [cell for line in tables[:3] for cell in re.findall(r"[\d.]+", line)]
    assert totals == [figure(rank.peak.total / GIB, 2) for rank, _ in found.ranks]
    assert len(set(totals)) > 2
    assert all(len(line) <= 80 for line in lines if line.startswith(("│", "┃", "┏", "└")))
