"""The power schedule, and the rules that carry rates to another batch size and width."""

import json
from pathlib import Path
from typing import Any

import pytest

from narrowgauge.engine.config.rate_blocks import ScheduleBlock
from narrowgauge.engine.run.schedule import rule_of
from tests.support import forked
from tests.support.cases import cases
from tests.support.command import losses, records, tiny_config

ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
SGD = {"type": "SGD", "params": {"lr": 0.01}}


def test_power_is_the_papers_formula() -> None:
    """Batches of 128 and 1024 sequences of 4096 tokens: ``batch * 4 * tokens ** -0.51``, worked out by hand."""
    block = ScheduleBlock.model_validate({"type": "power", "warmup_steps": 100})
    for sequences, expected in (
        (128, {0: 0.0, 50: 0.01, 100: 0.02, 1000: 0.01829318401, 100_000: 0.001746985511}),
        (1024, {0: 0.0, 100: 0.02, 1000: 0.02, 1_000_000: 0.001495558469}),
    ):
        rule = rule_of(block, 10**9, tokens_per_step=sequences * 4096, highest=0.02)
        assert {step: 0.02 * rule(step) for step in expected} == pytest.approx(expected, rel=1e-8)
    # A batch in shorter sequences counts by its tokens, and the run's length moves nothing before its decay.
    shorter = rule_of(block, 2000, tokens_per_step=128 * 4096, highest=0.02)
    assert shorter(1000) == rule_of(block, 10**9, tokens_per_step=1024 * 512, highest=0.02)(1000)
    decaying = block.model_copy(update={"decay_steps": 100, "min_lr_ratio": 0.1})
    ends = rule_of(decaying, 2000, tokens_per_step=128 * 4096, highest=0.02)
    assert ends(1900) == shorter(1900)
    assert ends(1950) == pytest.approx(0.55 * shorter(1950))
    assert ends(2000) == pytest.approx(0.1 * shorter(2000))


def train(path: Path, *words: str, ranks: int = 1) -> tuple[dict[int, float], list[dict[str, Any]], str]:
    """The losses, the steps' records and what was said."""
    result = forked.run("train", str(path), *words, ranks=ranks)
    assert result.returncode == 0, result.stderr
    run_dir = path.parent / "run"
    steps = [record for record in records(run_dir) if "loss" in record]
    return losses(run_dir), steps, " ".join((result.stdout + result.stderr).split())


def config_of(corpus: Path, folder: Path, training: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir()
    path = tiny_config(corpus, folder, **changes)
    config = json.loads(path.read_text())
    config["training"] |= {"steps": 6, "checkpoint_interval": 3, "eval_interval": 6, **training}
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("engine", "stage", "ranks"), [("ddp", 0, 1), pytest.param("deepspeed", 3, 2, marks=pytest.mark.slow)]
)
def test_power_goes_on_exactly(corpus: Path, tmp_path: Path, engine: str, stage: int, ranks: int) -> None:
    power = {"type": "power", "warmup_steps": 2, "reference_length": 32, "coefficient": 0.01}
    layout = {"engine": engine, "zero_optimization": {"stage": stage}}
    whole, steps, _ = train(config_of(corpus, tmp_path / "whole", {"lr_schedule": power}, **layout), ranks=ranks)
    expected = [0.005 * warm * min(1.0, 8 * 0.01 * (256 * k) ** -0.51 / 0.005 if k else 1.0)
                for k, warm in enumerate([0.0, 0.5, 1.0, 1.0, 1.0, 1.0])]  # fmt: skip
    assert [record["lr"] for record in steps] == pytest.approx(expected, rel=1e-12)
    assert expected[3] < 0.005
    cut = config_of(corpus, tmp_path / "cut", {"lr_schedule": power}, **layout)
    train(cut, "--set", "training.steps=3", ranks=ranks)
    assert train(cut, ranks=ranks)[0] == whole


@pytest.mark.parametrize(
    ("changes", "rule", "factor"),
    cases(
        {
            "AdamW": ({"engine": "ddp", "optimizer": ADAMW, "zero_optimization": {"stage": 0}}, "sqrt", 0.5**0.5),
            "SGD": ({"engine": "ddp", "optimizer": SGD, "zero_optimization": {"stage": 0}}, "linear", 0.5),
            "Grass-ZeRO-1": ({}, "sqrt", 0.5**0.5),
        },
        slow=["Grass-ZeRO-1"],
    ),
)
def test_rates_follow_the_batch_size(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], rule: str, factor: float
) -> None:
    training = {"batch_rule": {"base_batch_size": 16}, "lr_schedule": None, "steps": 2}
    path = config_of(corpus, tmp_path / "run", training, **changes)
    _, steps, said = train(path)
    rate = json.loads(path.read_text())["optimizer"]["params"]["lr"]
    assert [record["lr"] for record in steps] == pytest.approx([rate * factor] * 2, rel=1e-12)
    assert f"times {factor:.4g}, {rule} in the batch size, 8 in the place of 16" in said
    for name in ("config.json", "summary.json"):
        found = json.loads((path.parent / "run" / name).read_text())["rates"]["batch_rule"]
        assert found == {"rule": rule, "base_batch_size": 16, "batch_size": 8, "factor": pytest.approx(factor)}


@pytest.mark.parametrize(
    "changes",
    cases(
        {
            "ddp-AdamW": ({"engine": "ddp", "optimizer": ADAMW, "zero_optimization": {"stage": 0}},),
            "ZeRO-1-AdamW": ({"optimizer": ADAMW},),
            "ZeRO-3-AdamW": ({"optimizer": ADAMW, "zero_optimization": {"stage": 3}},),
            "ZeRO-1-Grass": ({},),
        },
        slow=["ddp-AdamW", "ZeRO-3-AdamW", "ZeRO-1-Grass"],
    ),
)
def test_rates_of_matrices_follow_the_width(corpus: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Found at a width of 8, used at 32: a quarter for the matrices, the rest as it was; and it goes on exactly."""
    training = {"width_rule": {"base_width": 8}, "lr_schedule": None, "steps": 4, "checkpoint_interval": 2}
    path = config_of(corpus, tmp_path / "whole", training, **changes)
    whole, steps, said = train(path)
    params = json.loads(path.read_text())["optimizer"]["params"]
    matrix = params["lr"] * params.get("matrix_lr_scale", 1.0) * 0.25
    assert [(r["lr"], r["lr_matrix"]) for r in steps] == [pytest.approx((params["lr"], matrix), rel=1e-12)] * 4
    assert "learning rates of matrices times 0.25, for a width of 32 in the place of 8" in said
    cut = config_of(corpus, tmp_path / "cut", training, **changes)
    train(cut, "--set", "training.steps=2")
    assert train(cut)[0] == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ['training.lr_schedule={"type": "power"}', 'training.batch_rule={"base_batch_size": 4}'],
            "training.batch_rule: expected none with training.lr_schedule.type 'power'",
        ),
        (
            ['training.lr_schedule={"type": "cosine", "exponent": -1.0}'],
            "exponent is of the type 'power', got 'cosine'",
        ),
        (['training.lr_schedule={"type": "power", "exponent": 0.5}'], "exponent: expected less than 0"),
        (
            ['training.lr_schedule={"type": "cosine", "decay_steps": 3}'],
            "decay_steps is of the types 'wsd' and 'power'",
        ),
        (
            ['training.lr_schedule={"type": "power", "decay_steps": 9}'],
            "lr_schedule: expected at most training.steps, 6, as warmup_steps and decay_steps together, got 0 and 9",
        ),
        (["training.batch_rule={}"], "training.batch_rule.base_batch_size: expected this key, got none"),
        (
            [
                "training.lr_schedule=null",
                'scheduler={"type": "WarmupLR", "params": {}}',
                'training.batch_rule={"base_batch_size": 4}',
            ],
            "training.batch_rule: expected training.lr_schedule, or none, beside it, got scheduler",
        ),
        (
            ['training.width_rule={"base_width": 4}', 'optimizer={"type": "Lars", "params": {"lr": 0.1}}'],
            "training.width_rule: expected an optimizer whose steps do not grow with the gradient",
        ),
        (
            [
                'training.width_rule={"base_width": 4}',
                'optimizer={"type": "Grass", "params": {"lr": 0.1, "rank": 4, "base": "Muon"}}',
            ],
            "training.width_rule: expected another optimizer.params.base beside it, got Muon: the rule is Adam's",
        ),
    ],
)
@pytest.mark.slow
def test_rates_that_would_not_be_followed_are_refused(
    corpus: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    settings = [word for setting in words for word in ("--set", setting)]
    result = forked.run("train", str(config_of(corpus, tmp_path / "run", {})), *settings)
    assert result.returncode == 2, result.stdout
    assert message in " ".join(result.stderr.split())
