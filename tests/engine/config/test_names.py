"""Misspelt keys are told before the libraries are imported."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from narrowgauge.engine.config import names
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.config.spelling import unknown_keys
from narrowgauge.engine.errors import ConfigError
from tests.support.command import ROOT, run, tiny_config


def test_the_file_is_what_the_schemas_say() -> None:
    """``python -m narrowgauge.engine.config.names`` writes it."""
    assert json.loads(names.FILE.read_text()) == names.all_names()


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_cliping": 1},
        {"zero_optimization": {"stag": 1}},
        {"training": {"steps": 2, "lr_schedule": {"typ": "wsd"}}},
        {"optimizer": {"type": "Grass", "params": {"lr": 0.1, "max_grad_norm": 1.0}}},
        {"optimizer": {"type": "Grass", "params": {"lr": 0.1, "densty": 0.5}}},
        {"data": {"train": [{"pth": "a.txt", "path": "a.txt"}]}},
        {"engine": "megatron", "zero_optimization": {"stage": 0}, "megatron": {"tensor_paralel": 1}},
        {"engine": "deepsped"},
    ],
)
def test_it_says_what_the_whole_check_says(change: dict[str, Any], tmp_path: Path) -> None:
    path = tiny_config(tmp_path, tmp_path, **change)
    raw = json.loads(path.read_text())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    found = list(unknown_keys(raw))
    assert len(found) == 1
    assert found[0] in caught.value.problems


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.json")), ids=lambda path: path.stem)
def test_what_is_right_is_let_through(path: Path) -> None:
    if path.parent.name != "models":
        assert list(unknown_keys(json.loads(path.read_text()))) == []


def test_a_typo_is_answered_in_a_second(tmp_path: Path) -> None:
    """Of the processor, best of three: the whole check's imports take several."""
    config, seconds = tiny_config(tmp_path, tmp_path, gradient_cliping=1.0), []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run("train", str(config))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert result.returncode == 2
        assert f"{config}: gradient_cliping: unknown key; did you mean 'gradient_clipping'?" in result.stderr
    assert min(seconds) < 1.0
