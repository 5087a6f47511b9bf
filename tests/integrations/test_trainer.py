"""Hugging Face's Trainer trains with our optimizers: to the weights of a plain loop around ``initialize``."""

from pathlib import Path

import pytest
from torch import Tensor

from tests.integrations.fine_tuning import (
    PARAMS,
    STEPS,
    model,
    refusal_of_sft,
    refusals_of_trainer,
    steps_until_refusal,
    train_by_loop,
    trained_by_trainer,
    weights_in,
)
from tests.support.ranks import RankPool
from tests.support.zero import worst

POOLS = {1: "one_rank", 2: "two_ranks"}
ADAPTER = "adapter_model.safetensors"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def by_loop(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Weights by the optimizer's name, made when they are asked for."""

    class Trained(dict[str, dict[str, Tensor]]):
        def __missing__(self, name: str) -> dict[str, Tensor]:
            folder = tmp_path_factory.mktemp("loop")
            one_rank.run(train_by_loop, folder, name=name)
            self[name] = weights_in(folder)
            return self[name]

    return Trained()


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        (1, None),
        (2, 1),
        pytest.param(2, None, marks=slow),
        *(pytest.param(ranks, stage, marks=slow) for ranks in (1, 2) for stage in range(4) if (ranks, stage) != (2, 1)),
    ],
)
def test_weights_are_those_of_a_plain_loop(
    ranks: int, stage: int | None, by_loop: dict[str, dict[str, Tensor]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pool: RankPool = request.getfixturevalue(POOLS[ranks])
    pool.run(trained_by_trainer, tmp_path, stage=stage)
    found = weights_in(tmp_path / "final")
    assert worst(found, by_loop["Grass"]) < 1e-5
    assert worst(model().state_dict(), by_loop["Grass"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 1])
@pytest.mark.parametrize("name", [name for name in PARAMS if name != "Grass"])
def test_every_optimizer(
    name: str, stage: int | None, by_loop: dict[str, dict[str, Tensor]], two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(trained_by_trainer, tmp_path, stage=stage, name=name)
    assert worst(weights_in(tmp_path / "final"), by_loop[name]) < 1e-5


@pytest.mark.slow
def test_bf16_by_autocast(by_loop: dict[str, dict[str, Tensor]], two_ranks: RankPool, tmp_path: Path) -> None:
    """The Trainer allows bf16 with a DeepSpeed file on GPUs only."""
    two_ranks.run(trained_by_trainer, tmp_path, stage=None, bf16=True)
    assert 1e-5 < worst(weights_in(tmp_path / "final"), by_loop["Grass"]) < 5e-2


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=() if stage == 2 else slow) for stage in (None, 1, 2, 3)])
def test_a_run_goes_on_from_a_checkpoint_on_another_number_of_ranks(
    stage: int | None,
    by_loop: dict[str, dict[str, Tensor]],
    one_rank: RankPool,
    two_ranks: RankPool,
    tmp_path: Path,
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    two_ranks.run(trained_by_trainer, tmp_path, stage=stage, **saving)
    resume = str(tmp_path / "checkpoint-3")
    assert worst(weights_in(Path(resume)), by_loop["Grass"]) > 1e-4
    (found,) = one_rank.run(trained_by_trainer, tmp_path / "resumed", stage=stage, resume=resume)
    assert found["steps"] == STEPS
    assert worst(weights_in(tmp_path / "resumed" / "final"), by_loop["Grass"]) < 1e-5


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=() if stage == 3 else slow) for stage in (0, 1, 2, 3)])
def test_adapters_with_a_deepspeed_file(stage: int, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path) -> None:
    """The Trainer asks for checkpoints without the frozen weights, among which DeepSpeed counts compact ones: the
    factors that Grass trains would have been left out of what is saved, and so this was refused.
    """
    one_rank.run(train_by_loop, tmp_path / "loop", adapters=True)
    expected = weights_in(tmp_path / "loop", ADAPTER)
    saving = {"save_strategy": "steps", "save_steps": 3}
    two_ranks.run(trained_by_trainer, tmp_path, stage=stage, adapters=True, **saving)
    found = weights_in(tmp_path / "final", ADAPTER)
    assert len(found) == 2 * 2 * 4
    assert worst(found, expected) < 1e-5
    resume = tmp_path / "checkpoint-3"
    assert worst(weights_in(resume, ADAPTER), expected) > 1e-4
    held = weights_in(resume / "global_step3")
    assert all("lora_" in name for name in held)
    one_rank.run(trained_by_trainer, tmp_path / "resumed", stage=stage, adapters=True, resume=str(resume))
    assert worst(weights_in(tmp_path / "resumed" / "final", ADAPTER), expected) < 1e-5


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=() if stage == 1 else slow) for stage in (None, 1, 3)])
def test_the_best_model_is_loaded_at_the_end(stage: int | None, one_rank: RankPool, tmp_path: Path) -> None:
    """The best is made the one of the highest loss: it is not the last."""
    every_two = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    (found,) = one_rank.run(trained_by_trainer, tmp_path, stage=stage, **every_two, **best)
    first, second, _ = found["losses"]
    assert first > second
    assert found["best"] == str(tmp_path / "checkpoint-2")
    final = weights_in(tmp_path / "final")
    assert worst(final, weights_in(tmp_path / "checkpoint-2")) == 0.0
    assert worst(final, weights_in(tmp_path / "checkpoint-4")) > 1e-4


@pytest.mark.parametrize(
    ("ranks", "stage", "checkpointing"),
    [(1, None, False), pytest.param(2, 3, True, marks=slow), pytest.param(2, None, True, marks=slow)],
)
def test_activations_are_offloaded_and_recomputed(
    ranks: int,
    stage: int | None,
    checkpointing: bool,
    by_loop: dict[str, dict[str, Tensor]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    pool: RankPool = request.getfixturevalue(POOLS[ranks])
    offload = {"path": str(tmp_path), "keep_resident": 0.0, "min_tensor_bytes": 1024, "capacity_bytes": 1 << 26}
    found = pool.run(trained_by_trainer, tmp_path, stage=stage, offload=offload, gradient_checkpointing=checkpointing)
    assert all(each["written"] > 10_000 for each in found)
    assert worst(weights_in(tmp_path / "final"), by_loop["Grass"]) < 1e-5


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=() if stage == 1 else slow) for stage in range(4)])
def test_a_trainer_that_drops_the_optimizer_makes_no_step(stage: int, one_rank: RankPool, tmp_path: Path) -> None:
    """With a DeepSpeed file the Trainer makes an AdamW of its own, and Grass's layers were frozen for it: it made a
    first step, before the next forward noticed.
    """
    ((steps, said),) = one_rank.run(steps_until_refusal, tmp_path, stage=stage, file_optimizer=None)
    assert steps == 0
    assert "expected values that only Grass changes" in said


def test_a_file_with_our_optimizer_and_a_trainer_that_is_not_prepared_make_no_step(
    one_rank: RankPool, tmp_path: Path
) -> None:
    ((steps, said),) = one_rank.run(steps_until_refusal, tmp_path, stage=1, file_optimizer="Grass")
    assert steps == 0
    assert "Grass" in said


GRASS = {"type": "Grass", "params": {"density": 0.25}}
REFUSED = {
    "client": ({"stage": 1, "client": True}, "got Grass, which the Trainer drops"),
    "two": (
        {"stage": 1, "in_file": "Grass", "optimizer": GRASS},
        "optimizer: expected it here or in the DeepSpeed file",
    ),
    "nothing": ({}, "expected optimizer, activation_offload or a DeepSpeed file, got none"),
    "both": ({"client": True, "optimizer": GRASS}, "expected it here or in the Trainer's optimizers, got both"),
    "name": ({"optimizer": {"type": "grass"}}, "optimizer.type: expected one of Grass,"),
    "key": ({"optimizer": {"type": "Grass", "params": {"densty": 0.25}}}, "did you mean 'density'?"),
    "rate": ({"optimizer": {"type": "Grass", "params": {"lr": 1.0, "density": 0.25}}}, "say, 0.01, got 1.0"),
    "optim": ({"optimizer": GRASS, "arguments": {"optim": "sgd"}}, "optim: sgd is another optimizer"),
    "batch": ({"optimizer": GRASS, "arguments": {"auto_find_batch_size": True}}, "auto_find_batch_size: not supported"),
    "fp16": ({"stage": 1, "in_file": "Grass", "arguments": {"fp16": True}}, "fp16: not supported with our optimizers"),
    "file": ({"stage": 1, "in_file": "Lamb", "arguments": {"optim": "sgd"}}, "optim: sgd is another optimizer"),
}


def test_what_cannot_work_is_refused_before_anything_is_trained(one_rank: RankPool, tmp_path: Path) -> None:
    (said,) = one_rank.run(refusals_of_trainer, tmp_path, {case: asked for case, (asked, _) in REFUSED.items()})
    for case, (_, expected) in REFUSED.items():
        assert expected in said[case], case


@pytest.mark.slow
def test_offload_with_trls_loss_is_refused_at_stage_3_alone(one_rank: RankPool, tmp_path: Path) -> None:
    """TRL gathers the head's parameter in backward, where autograd gives what was kept of it: another tensor."""
    for stage in (2, 3):
        (said,) = one_rank.run(refusal_of_sft, tmp_path / str(stage), stage=stage)
        assert ("loss_type: at ZeRO-3 TRL's nll looks for the head's parameter" in said) == (stage == 3), said
