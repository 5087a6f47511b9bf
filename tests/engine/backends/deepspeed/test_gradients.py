"""Updates with gradients that are missing or not finite, under every ZeRO stage."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from narrowgauge.engine import initialize
from tests.support.cases import cases
from tests.support.models import token_batch
from tests.support.ranks import RankPool
from tests.support.zero import finish, full_weights

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Grass": {"density": 0.25, "refresh_interval": 3},
    "GaLore": {"rank": 8, "refresh_interval": 3},
    "Frugal": {"density": 0.25, "refresh_interval": 3},
    "Apollo": {"rank": 4},
    "Lamb": {},
    "Lars": {},
    "AdamW": {"torch_adam": True},
}
STAGES: list[dict[str, Any]] = [{"stage": stage} for stage in range(4)]
OFFLOADED: list[dict[str, Any]] = [{"stage": stage, "offload_optimizer": {"device": "cpu"}} for stage in (1, 2, 3)]


class DropsLayers(nn.Module):
    """Leaves out another block in each micro-batch (LayerDrop, an idle expert).

    Attributes:
        is_poisoned: the next loss is finite, and its gradient is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 20)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20)) for _ in range(3))
        self.head = nn.Linear(20, 37)
        self.num_calls, self.drop_every, self.is_poisoned = 0, 3, False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        self.num_calls += 1
        for number, block in enumerate(self.blocks):
            if (self.num_calls + number) % 3 or not self.drop_every:
                x = x + block(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())
        return loss + torch.sqrt((x * 0.0).sum()) if self.is_poisoned else loss


def make_engine(optimizer: str, zero: dict[str, Any], accumulation: int, **more: Any) -> Any:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2, **OPTIMIZERS[optimizer]}},
        **more,
    }
    engine, *_ = initialize(model=DropsLayers(), config=config)
    return engine


def micro_step(engine: Any, number: int) -> float:
    loss = engine(token_batch(number, 4).chunk(dist.get_world_size())[dist.get_rank()])
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def losses_of(optimizer: str, zero: dict[str, Any], accumulation: int = 1) -> list[float]:
    engine = make_engine(optimizer, zero, accumulation)
    losses = [micro_step(engine, number) for number in range(7 * accumulation)]
    finish(engine)
    return losses


@pytest.mark.parametrize("optimizer", cases({name: (name,) for name in OPTIMIZERS}, slow={"Frugal", "Apollo", "Lars"}))
def test_a_parameter_without_a_gradient_has_a_gradient_of_zero_at_every_stage(
    one_rank: RankPool, optimizer: str
) -> None:
    """ZeRO-3, and every stage with the optimizer on the CPU, stepped with the parameter's gradient of an earlier step:
    with AdamW the seventh loss was 2.71 instead of 2.76.
    """
    (expected,) = one_rank.run(losses_of, optimizer, {"stage": 0})
    for zero in STAGES[1:]:
        assert one_rank.run(losses_of, optimizer, zero)[0] == pytest.approx(expected, abs=1e-5), zero


@pytest.mark.parametrize("optimizer", ["Grass", "AdamW"])
def test_a_gradient_of_an_earlier_micro_batch_reaches_an_optimizer_on_the_cpu(
    one_rank: RankPool, optimizer: str
) -> None:
    """DeepSpeed copied gradients to the CPU in the last micro-batch alone: one that a parameter had in the first only
    was lost, and the one of the step before applied.
    """
    (expected,) = one_rank.run(losses_of, optimizer, {"stage": 1}, 2)
    for zero in OFFLOADED:
        assert one_rank.run(losses_of, optimizer, zero, 2)[0] == pytest.approx(expected, abs=1e-5), zero


def skip_one(optimizer: str, zero: dict[str, Any], poisoned_step: int) -> dict[str, Any]:
    engine = make_engine(optimizer, zero, 1)
    engine.module.drop_every = 0
    for number in range(poisoned_step):
        micro_step(engine, number)
    before = full_weights(engine) if hasattr(engine, "write_back") or zero["stage"] < 3 else {}
    engine.module.is_poisoned = dist.get_rank() == 1
    micro_step(engine, poisoned_step)
    engine.module.is_poisoned = False
    after = full_weights(engine) if before else {}
    found = {
        "changed": [name for name, value in before.items() if not torch.equal(after[name], value)],
        "skipped": engine.skipped_steps,
        "applied": engine.was_step_applied(),
        "losses": [micro_step(engine, number) for number in range(poisoned_step + 1, poisoned_step + 5)],
        "steps": engine.global_steps,
    }
    finish(engine)
    return found


@pytest.mark.cover(1)
@pytest.mark.parametrize("zero", STAGES, ids=lambda zero: f"zero{zero['stage']}")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_whose_gradients_are_not_finite_on_one_rank_is_left_out_on_all(
    two_ranks: RankPool, optimizer: str, zero: dict[str, Any]
) -> None:
    """At ZeRO-0 in fp32 they were applied, and every weight was NaN; GaLore, whose bases are due after the first step,
    ended in the SVD of a statistic that is not finite.
    """
    found = two_ranks.run(skip_one, optimizer, zero, 0 if optimizer == "GaLore" else 2)
    for own in found:
        assert own["changed"] == []
        assert (own["skipped"], own["applied"]) == (1, False)
        assert all(0.5 < loss < 5.0 for loss in own["losses"])
