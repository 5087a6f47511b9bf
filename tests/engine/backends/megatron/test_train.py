"""``narrowgauge train`` with the ``megatron`` engine: a run that is resumed in another layout, and its export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from narrowgauge.engine.config.config import load_config
from tests.support import forked
from tests.support.command import ROOT, losses, tiny_config
from tests.support.megatron_models import FAMILIES, SIZES

ADAMW = {"type": "AdamW", "params": {"lr": 0.005}}


def changed(config: Path, **changes: Any) -> Path:
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return config


@pytest.mark.slow
def test_a_run_is_resumed_in_another_layout_and_exported(corpus: Path, tmp_path: Path) -> None:
    """Two stages for four steps, then two ranks per matrix; ``ddp`` on one rank says what is expected."""
    folders = [tmp_path / name for name in ("megatron", "ddp")]
    for folder in folders:
        folder.mkdir()
    training = {"steps": 6, "eval_sequences": 5, "checkpoint_interval": 4}
    common = {"training": training, "optimizer": ADAMW, "zero_optimization": {"stage": 0}}
    config = tiny_config(corpus, folders[1], engine="ddp", **common)
    assert forked.run("train", str(config)).returncode == 0
    layouts = [{"pipeline_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}]
    config = tiny_config(corpus, folders[0], engine="megatron", megatron=layouts[0], **common)
    sample = ["--set", "training.sample_prompt=def "]
    first = forked.run("train", str(config), *sample, "--set", "training.steps=4", ranks=2)
    assert first.returncode == 0, first.stderr
    assert "AdamW at PP2 DP1 on 2 ranks" in first.stdout.replace("\n", " ")
    assert json.loads((folders[0] / "run" / "summary.json").read_text())["sample"].startswith("def ")
    second = forked.run("train", str(changed(config, megatron=layouts[1])), ranks=2)
    assert second.returncode == 0, second.stderr
    assert "resumed after step 4" in second.stdout.replace("\n", " ")
    found, expected = losses(folders[0] / "run"), losses(folders[1] / "run")
    assert len(found) == 6
    assert found == pytest.approx(expected, abs=2e-6)
    one, other = (json.loads((folder / "run" / "summary.json").read_text()) for folder in folders)
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], abs=2e-6)
    assert one["parameters"] == other["parameters"]
    for folder in folders:
        assert forked.run("export", str(folder / "run"), str(folder / "model")).returncode == 0
    exported, plain = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    assert exported.keys() == plain.keys()
    assert all(torch.allclose(exported[name], plain[name], rtol=0, atol=2e-5) for name in plain)
    assert AutoModelForCausalLM.from_pretrained(folders[0] / "model").config.model_type == "llama"


@pytest.mark.slow
def test_a_mixture_records_how_its_experts_are_used(corpus: Path, tmp_path: Path) -> None:
    """Compact experts, a balance loss over the whole batch and dropped tokens, in a whole run."""
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = tiny_config(
        corpus,
        tmp_path,
        engine="megatron",
        model={"config": {"model_type": "mixtral", **sizes, **FAMILIES["mixtral"], "router_aux_loss_coef": 0.1}},
        megatron={"expert_parallel": 2, "balance_loss": "global", "expert_capacity_factor": 1.0},
        training={"steps": 3},
        zero_optimization={"stage": 0},
        logging={"run_dir": str(tmp_path / "run"), "tensorboard": True},
    )
    result = forked.run("train", str(config), ranks=2)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    experts = [record["experts"] for record in records if "experts" in record]
    assert len(experts) == 3
    for own in experts:
        assert own["balance_loss"] >= 0.9
        assert all(1.0 <= load <= 2.0 for load in own["max_load"].values())
        # What the most chosen expert has above an even share, in all micro-batches together, is dropped at least.
        assert max(own["max_load"].values()) / 4 - 1 / 4 <= own["dropped"] * len(own["max_load"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert len(events.Scalars("train/experts/max_load/0")) == len(events.Scalars("train/experts/dropped")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("zero", [[], ["megatron.pipeline_parallel=1", "zero_optimization.stage=2"]], ids=["", "zero"])
def test_the_first_steps_of_the_quickstart(tmp_path: Path, zero: list[str]) -> None:
    """As it is, and as the page on ZeRO says."""
    words = [*zero, "training.steps=6", "training.checkpoint_interval=null", f"logging.run_dir={tmp_path}/run"]
    words += ["training.eval_sequences=8", "training.lr_schedule=null"]
    changes = [word for change in words for word in ("--set", change)]
    result = forked.run("train", "megatron-quickstart", *changes, ranks=4)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_loss"] < summary["eval_loss_first"] - 0.5
    assert 1e6 < summary["parameters"]["total"] < 2e6


def test_the_quickstart_is_what_the_page_says() -> None:
    config: Any = load_config(ROOT / "configs" / "megatron-quickstart.json")
    assert config.bf16
    assert config.parsed.megatron.tensor_parallel == config.parsed.megatron.pipeline_parallel == 2
    assert config.parsed.launch.processes_per_node == 4


def test_what_does_not_fit_the_model_is_told_before_data_are_prepared(corpus: Path, tmp_path: Path) -> None:
    """Of which no such tokenizer could be trained. Megatron itself would end in the first step, with a traceback."""
    config = tiny_config(
        corpus,
        tmp_path,
        engine="megatron",
        megatron={"recompute": "full", "recompute_layers": 5},
        data={"train": [f"{corpus}/*.txt"], "vocab_size": 1_000_000, "sequence_length": 32},
        optimizer=ADAMW,
        zero_optimization={"stage": 0},
    )
    result = forked.run("train", str(config), COLUMNS="300")
    assert result.returncode == 2
    assert "megatron.recompute_layers: expected a divisor of the 2 layers that each stage has, got 5" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
