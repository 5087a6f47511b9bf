"""Steps of shorter and more sequences: which tokens they hold, what they change, and how a run goes on."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from narrowgauge.engine.data.loader import RankSampler, training_loader
from narrowgauge.engine.data.packed import PackedTokens
from narrowgauge.engine.run.lengths import Lengths
from tests.support import forked
from tests.support.cases import cases
from tests.support.command import losses, records, tiny_config, under_megatron

FULL, SAMPLES, BATCH = 32, 24, 6
PLAN = Lengths((((8, 16), 3), ((16,), 2)), FULL)


def steps_of(first: int, last: int, rank: int, ranks: int, plan: Lengths = PLAN) -> list[torch.Tensor]:
    """What a process rank trains in each step: all micro-batches, below each other."""
    samples = PackedTokens([(Path("tokens"), np.arange(SAMPLES * FULL))], FULL, SAMPLES * FULL)
    sampler = RankSampler(
        partial(samples.order, seed=3),
        first_step=first,
        last_step=last,
        micro_batch_size=BATCH // (2 * ranks),
        accumulation_steps=2,
        rank=rank,
        world_size=ranks,
    )
    batches = iter(training_loader(samples, sampler, 0))
    return [torch.cat([plan.cut(next(batches), step) for _ in range(2)]) for step in range(first, last)]  # pyright: ignore


@pytest.mark.parametrize("ranks", [1, 3])
def test_no_token_is_repeated_or_left_out(ranks: int) -> None:
    """Over two epochs of four steps each, stopped within the first phase and within the second."""
    found: list[torch.Tensor] = []
    for first, last in ((0, 2), (2, 4), (4, 8)):
        of_ranks = [steps_of(first, last, rank, ranks) for rank in range(ranks)]
        for step in range(first, last):
            parts = [part[step - first] for part in of_ranks]
            length = [8, 16, 8, 16, 16, 32, 32, 32][step]
            assert all(part.shape == (BATCH * FULL // length // ranks, length) for part in parts)
            # Pieces are whole runs of the corpus.
            assert all(torch.equal(part, part[:, :1] + torch.arange(length)) for part in parts)
            found.append(torch.cat(parts).flatten())
    for epoch in (found[:4], found[4:]):
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(SAMPLES * FULL))
    # As many tokens in each step, and the same ones, as without a schedule.
    plain = [torch.cat([steps_of(0, 8, rank, ranks, Lengths((), FULL))[step].flatten() for rank in range(ranks)])
             for step in range(8)]  # fmt: skip
    assert all(torch.equal(a.sort().values, b.sort().values) for a, b in zip(found, plain, strict=True))


def train(path: Path, *words: str, ranks: int = 1) -> tuple[dict[int, float], list[dict[str, Any]], str]:
    result = forked.run("train", str(path), *words, ranks=ranks)
    assert result.returncode == 0, result.stderr
    run_dir = path.parent / "run"
    return losses(run_dir), records(run_dir), " ".join((result.stdout + result.stderr).split())


SCHEDULE = [{"lengths": [8, 16], "steps": 3}, {"lengths": [16], "steps": 2}]


def config_of(corpus: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    path = tiny_config(corpus, folder, **changes)
    config = json.loads(path.read_text())
    config["training"] |= {"steps": 7, "checkpoint_interval": 1, "eval_interval": 7, "length_schedule": SCHEDULE}
    config["training"] |= {"lr_schedule": None, "batch_rule": {"base_batch_size": 8}}
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("ranks", "changes"),
    cases(
        {
            "ZeRO-1": (2, {}),
            "ZeRO-3": (2, {"zero_optimization": {"stage": 3}}),
            "ddp": (1, {"engine": "ddp", "zero_optimization": {"stage": 0}}),
            "megatron": (2, under_megatron(tensor_parallel=2, sequence_parallel=True)),
        },
        slow=["ZeRO-1", "ZeRO-3", "megatron"],
    ),
)
def test_runs_go_on_exactly_and_offload_changes_nothing(
    corpus: Path, tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    """Rates go with the square root of the sequences; evaluation is at full length, and the tokens stay as many."""
    path = config_of(corpus, tmp_path / "whole", **changes)
    whole, found, said = train(path, ranks=ranks)
    steps = [record for record in found if "loss" in record]
    assert [record["sequence_length"] for record in steps] == [8, 16, 8, 16, 16, 32, 32]
    expected = [0.005 * (32 / length) ** 0.5 for length in (8, 16, 8, 16, 16, 32, 32)]
    assert [record["lr"] for record in steps] == pytest.approx(expected, rel=1e-12)
    assert [record["tokens"] for record in steps] == [256 * step for step in range(1, 8)]
    assert "3 steps of sequences of 8, 16 tokens in turn, cut from those of 32" in said
    assert json.loads((path.parent / "run" / "summary.json").read_text())["rates"]["length_schedule"] == SCHEDULE
    (tmp_path / "disk").mkdir()
    offload = {"path": str(tmp_path / "disk"), "min_tensor_bytes": 0, "keep_resident": 0}
    cut = config_of(corpus, tmp_path / "cut", activation_offload=offload, **changes)
    train(cut, "--set", "training.steps=5", ranks=ranks)
    again, records_again, _ = train(cut, ranks=ranks)
    assert again == whole
    evaluations = [[r["eval_loss"] for r in of_run if "eval_loss" in r] for of_run in (found, records_again)]
    # The run that was stopped has one more, where it was.
    evaluations[1] = [evaluations[1][0], evaluations[1][-1]]
    assert evaluations[0] == evaluations[1]
    assert sum(record["bytes"]["offload_written"] for record in records_again if "loss" in record) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (['training.length_schedule=[{"lengths": [12], "steps": 1}]'], "expected divisors of data.sequence_length, 32"),
        (['training.length_schedule=[{"lengths": [1], "steps": 1}]'], "expected greater than 1, got 1"),
        (['training.length_schedule=[{"lengths": [8], "steps": 8}]'], "expected at most training.steps, 7, in all"),
        (["training.length_schedule=[]"], "training.length_schedule: "),
        (['training.length_schedule=[{"length": [8], "steps": 1}]'], "unknown key; did you mean 'lengths'?"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(corpus: Path, tmp_path: Path, words: list[str], message: str) -> None:
    settings = [word for setting in words for word in ("--set", setting)]
    result = forked.run("train", str(config_of(corpus, tmp_path / "run")), *settings)
    assert result.returncode == 2, result.stdout
    assert message in " ".join(result.stderr.split())
