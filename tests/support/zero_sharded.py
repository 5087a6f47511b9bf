"""Optimizers on full gradients under DeepSpeed ZeRO against the same optimizer in one process of plain torch."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowgauge.optimizers import OPTIMIZERS, ShardedOptimizer
from tests.support.models import tiny
from tests.support.zero import CLIP, ds_config, finish, full_weights, make_engine, plain_steps, train_step, worst


def one_process(kind: str, params: dict[str, Any], steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights on the whole batch, with accumulation and clipping."""
    model = tiny()
    cls: Any = OPTIMIZERS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of more than one process rank
        optimizer = cls(model, **params)

    def update() -> None:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert float(norm) > CLIP, "clipping must take part"
        optimizer.step()

    return plain_steps(model, steps, update), model.state_dict()


def engine_of(kind: str, params: dict[str, Any], stage: int, *, zero_init: bool = False, **overrides: Any) -> Any:
    optimizer = {"type": kind, "params": params}
    return make_engine(ds_config(stage, optimizer=optimizer, **overrides), zero_init=zero_init)


def compare_with_one_process(
    kind: str, params: dict[str, Any], stage: int, steps: int, zero_init: bool, **overrides: Any
) -> dict[str, Any]:
    engine = engine_of(kind, params, stage, zero_init=zero_init, **overrides)
    losses = [train_step(engine, step) for step in range(steps)]
    expected_losses, expected = one_process(kind, params, steps)
    own: ShardedOptimizer = engine.own_optimizer
    result = {
        "loss": max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)),
        "weights": worst(full_weights(engine), expected),
        "subspace": own.subspace_state(),
        "state_numbers": sum(v.numel() for s in own.state.values() for v in s.values() if torch.is_tensor(v)),
    }
    finish(engine)
    return result


def save_at(kind: str, params: dict[str, Any], stage: int, folder: Path, at: int, last: int) -> list[float]:
    """Train, saving after ``at`` steps; the losses after that."""
    engine = engine_of(kind, params, stage)
    losses = []
    for step in range(last):
        if step == at:
            engine.save_checkpoint(folder, tag="saved")
        losses.append(train_step(engine, step))
    finish(engine)
    return losses[at:]


def continue_from(kind: str, params: dict[str, Any], stage: int, folder: Path, at: int, last: int) -> list[float]:
    """Load into an engine that has already trained on something else, and train on."""
    engine = engine_of(kind, params, stage)
    train_step(engine, 99)
    engine.load_checkpoint(folder, tag="saved")
    assert engine.own_optimizer.num_steps == at
    losses = [train_step(engine, step) for step in range(at, last)]
    finish(engine)
    return losses
