"""Runs that train a part of each batch."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked
from tests.support.chat import conversations, save_tokenizer, write_lines
from tests.support.command import losses, records, tiny_config

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources, one of them small."""
    folder = tmp_path_factory.mktemp("sources")
    save_tokenizer(folder / "tokenizer")
    lines = conversations(200)
    for name, part in (("large", lines[:110]), ("middle", lines[110:190]), ("small", lines[190:])):
        write_lines(folder / f"{name}.jsonl", part)
    return folder


def config_of(folder: Path, target: Path, **changes: Any) -> Path:
    path = tiny_config(folder, target, engine="ddp", coreset={"method": "colm", "directions": 3, "coordinates": 200})
    config = json.loads(path.read_text())
    config["model"]["config"]["max_position_embeddings"] = 64
    sources = [{"path": str(folder / f"{name}.jsonl"), "name": name} for name in ("large", "middle", "small")]
    config["data"] = {"train": sources, "tokenizer": str(folder / "tokenizer"), "sequence_length": 64}
    config["data"]["cache_dir"] = str(folder / "cache")
    config["training"] |= {"steps": 6, "checkpoint_interval": 3, "eval_interval": 6}
    config["training"]["lr_schedule"] = {"type": "constant"}
    config |= {"train_batch_size": 16, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 0}, **changes}
    path.write_text(json.dumps(config))
    return path


def train(path: Path, *words: str, ranks: int = 1) -> tuple[dict[int, float], list[dict[str, int]]]:
    """The losses, and how many of each source were trained in each step."""
    result = forked.run("train", str(path), *words, ranks=ranks)
    assert result.returncode == 0, result.stderr
    run_dir = path.parent / "run"
    return losses(run_dir), [record["coreset"] for record in records(run_dir) if "coreset" in record]


def test_two_ranks_choose_what_one_does_and_a_resumed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    """From equal weights: after an update those of another layout are rounded otherwise, and so may be a choice."""
    for name in ("one", "whole", "cut"):
        (tmp_path / name).mkdir()
    common = {"train_micro_batch_size_per_gpu": 4, "train_batch_size": 8}
    on_two = {"engine": "deepspeed", "zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 1}
    alone, kept_alone = train(config_of(folder, tmp_path / "one", **common), "--set", "training.steps=1")
    whole, kept = train(config_of(folder, tmp_path / "whole", **common, **on_two), ranks=2)
    assert [sum(counts.values()) for counts in kept] == [8] * 6
    assert kept_alone == kept[:1]
    assert whole[1] == pytest.approx(alone[1], abs=2e-6)
    cut = config_of(folder, tmp_path / "cut", **common, **on_two)
    train(cut, "--set", "training.steps=3", ranks=2)
    assert train(cut, ranks=2) == (whole, kept)


@pytest.mark.slow
def test_four_ranks_choose_what_one_does(folder: Path, tmp_path: Path) -> None:
    found = {}
    for ranks, micro_batch in ((1, 4), (4, 2)):
        target = tmp_path / str(ranks)
        target.mkdir()
        accumulation = 8 // (ranks * micro_batch)
        sizes = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}
        config = config_of(folder, target, train_batch_size=8, **sizes)
        found[ranks] = train(config, "--set", "training.steps=1", ranks=ranks)
    (alone, kept), (losses_of_four, kept_of_four) = found[1], found[4]
    assert kept_of_four == kept
    assert losses_of_four[1] == pytest.approx(alone[1], abs=2e-6)


def test_small_sources_are_trained_whole(folder: Path, tmp_path: Path) -> None:
    _, kept = train(config_of(folder, tmp_path))
    # 32 examples are looked at in a step, of which a twentieth is of the small source.
    assert sum(counts["small"] for counts in kept) >= 6
    assert all(counts["large"] + counts["middle"] + counts["small"] == 16 for counts in kept)


@pytest.mark.slow
def test_the_hardest_have_higher_losses(folder: Path, tmp_path: Path) -> None:
    """Of the same 32 examples, before the first update."""
    first = []
    for name, skipped in (("hard", 0.0), ("skipping", 0.25), ("easy", 0.5)):
        (tmp_path / name).mkdir()
        coreset = {"method": "hard", "keep": 0.5, "skip_hardest": skipped}
        found, _ = train(config_of(folder, tmp_path / name, coreset=coreset))
        first.append(found[1])
    assert first == sorted(first, reverse=True)
    assert first[0] > first[2] + 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coreset.keep=0.3"], "coreset.keep: expected the gradient accumulation's 2 steps divided by it"),
        (["data.packing=true"], "coreset: expected data.packing false"),
        (['coreset.whole_sources=["tiny"]'], "coreset.whole_sources: expected names of data.train's sources"),
        (["coreset.module=model.layers.7.self_attn.v_proj"], "coreset.module: expected the name of a linear layer"),
        (['coreset={"method": "hard", "directions": 2}'], "directions is of the method 'colm', got 'hard'"),
        (['data.train="stdlib"', "data.tokenizer=null"], "coreset: expected records as data.train"),
    ],
)
def test_what_cannot_be_chosen_from_is_said(folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    settings = [word for setting in words for word in ("--set", setting)]
    result = forked.run("train", str(config_of(folder, tmp_path)), *settings)
    assert result.returncode == 2, result.stdout
    assert message in " ".join(result.stderr.split())
