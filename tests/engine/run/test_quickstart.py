"""The configuration behind ``make train``, for its first steps."""

import json
from pathlib import Path

import pytest

from narrowgauge.engine.config.config import load_config
from tests.support.command import ROOT
from tests.support.forked import run

QUICKSTART = ROOT / "configs" / "quickstart.json"


@pytest.mark.quick("some-text")
@pytest.mark.parametrize("text", ["some-text", "its-own-text"])
def test_its_first_steps(text: str, corpus: Path, tmp_path: Path) -> None:
    words = ["training.steps=8", "training.checkpoint_interval=null", f"logging.run_dir={tmp_path}/run"]
    if text == "some-text":
        # A tokenizer of the whole library takes a minute.
        words += [f'data.train=["{corpus}/*.txt"]', f"data.cache_dir={tmp_path}/cache"]
    words += ["training.sample_tokens=8", "training.eval_sequences=16", "data.sequence_length=32"]
    result = run("train", str(QUICKSTART), *(word for change in words for word in ("--set", change)), ranks=2)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 5e6 <= summary["parameters"]["total"] <= 15e6
    assert summary["eval_loss"] < summary["eval_loss_first"] - 1.0
    assert summary["bytes"]["reduced_per_step"] < 0.5 * summary["bytes"]["reduced_per_step_dense"]
    assert summary["bytes"]["optimizer_state"] < 0.5 * summary["bytes"]["optimizer_state_dense"]
    # 0.44 here: its tensors are a quarter as long as the quickstart's.
    held, saved = summary["bytes"]["saved_activations_resident_median"], summary["bytes"]["saved_activations_peak"]
    assert held < 0.6 * saved
    assert summary["sample"].startswith("def ")
    assert "dense AdamW" in result.stdout


def test_it_is_what_the_readme_says() -> None:
    config = load_config(QUICKSTART)
    assert config.bf16
    assert config.zero_stage == 1
    assert config.raw["optimizer"]["type"] == "Grass"
    assert config.raw["data"]["train"] == "stdlib"
    assert config.raw["logging"]["run_dir"] == "runs/quickstart"
