"""TRAlgorithm against its closed form, its base and a statement on whole weights; alone, in engines and resumed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from narrowgauge.engine.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from narrowgauge.optimizers import GaLore, Grass, GrassUnbiased, Lamb, TrustRegion
from narrowgauge.optimizers.trust_region import inner_rate
from tests.engine.backends.ddp.test_parity import CASES, finish, make_engine, train, weights_of
from tests.support import forked
from tests.support.command import losses, tiny_config, under_megatron
from tests.support.models import tiny, token_batch
from tests.support.ranks import RankPool
from tests.support.zero import worst

CYCLE, PULL = 4, 0.3
MAKE: dict[str, Any] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9),
    "Lamb": lambda model: Lamb(model, lr=1e-2),
    "Grass": lambda model: Grass(model, lr=1e-2, density=0.3, refresh_interval=6, weight_decay=0.0),
    "Grass-carry": lambda model: Grass(
        model, lr=1e-2, density=0.3, refresh_interval=6, weight_decay=0.0, moments="carry", selection="top"
    ),
    "Grass-unbiased": lambda model: Grass(
        model, lr=1e-2, density=0.3, refresh_interval=6, weight_decay=0.0, selection="multinomial_replacement"
    ),
    "GaLore": lambda model: GaLore(model, lr=1e-2, rank=4, refresh_interval=6, weight_decay=0.0),
}


def scheduled(optimizer: Any, steps: int = CYCLE) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: inner_rate(step, steps))


def step_of(model: nn.Module, optimizer: Any, schedule: LambdaLR, step: int) -> None:
    optimizer.zero_grad()
    model(token_batch(step, 4)).backward()
    optimizer.step()
    schedule.step()


def test_a_quadratic_has_its_closed_form() -> None:
    """On ``h / 2 (w - c)^2`` a cycle of SGD shrinks the distance to a fixed point by Gamma(t+1-k) / (Gamma(1-k) t!)."""
    h, c, w0, lr, steps = 0.7, 2.0, -1.0, 0.25, 7
    k = lr * h + 2 * PULL
    weight = nn.Parameter(torch.tensor(w0, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=lr)
    schedule = scheduled(optimizer, steps)
    TrustRegion(optimizer, lambda: schedule.last_epoch, pull=PULL, steps=steps)
    for cycle_start in (w0, None):
        start = weight.item() if cycle_start is None else cycle_start
        fixed = (lr * h * c + 2 * PULL * start) / k
        for t in range(1, steps + 1):
            optimizer.zero_grad()
            (h / 2 * (weight - c) ** 2).backward()
            optimizer.step()
            schedule.step()
            shrunk = math.gamma(t + 1 - k) / (math.gamma(1 - k) * math.factorial(t))
            assert weight.item() == pytest.approx(fixed + shrunk * (start - fixed), rel=1e-12)


@pytest.mark.quick("Grass", "AdamW", "GaLore")
@pytest.mark.parametrize("name", MAKE)
def test_cycles_of_one_step_are_the_optimizer_alone(name: str) -> None:
    found = []
    for is_held in (False, True):
        model = tiny(blocks=1)
        optimizer = MAKE[name](model)
        schedule = scheduled(optimizer, 1)
        if is_held:
            TrustRegion(optimizer, lambda schedule=schedule: schedule.last_epoch, pull=PULL, steps=1)
        for step in range(8):
            step_of(model, optimizer, schedule, step)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


class Stated:
    """The method on whole weights, around an optimizer that does not know of it: no subspace, no state, no hooks."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer, self.anchors = model, optimizer, {}
        self.layers = {layer.name: layer.module for layer in getattr(optimizer, "layers", ())}
        self.refreshes = 0

    def trained(self) -> Mapping[str, Tensor]:
        """Whole weights, and what else is trained."""
        compact = {f"{name}.compact" for name in self.layers}
        plain = {name: p for name, p in self.model.named_parameters() if p.requires_grad and name not in compact}
        return plain | {f"{name}.weight": module.weight for name, module in self.layers.items()}

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        t, refreshes = step % CYCLE, getattr(self.optimizer, "num_refreshes", 0)
        moved = refreshes != self.refreshes
        self.refreshes = refreshes
        for name, weight in self.trained().items():
            if t == 0 or (moved and name.removesuffix(".weight") in self.layers):
                self.anchors[name] = weight.detach().clone()
            weight -= 2 * PULL / (t + 1) * (weight - self.anchors[name])
        for module in self.layers.values():
            if not self.optimizer.folds_to_zero:
                module.compact.copy_(module.compact_of(module.weight))
            module.note()


@pytest.mark.quick("Grass", "GaLore", "Grass-unbiased")
@pytest.mark.parametrize("name", MAKE)
def test_it_is_the_statement_on_whole_weights(name: str) -> None:
    """Over refreshes within a cycle, in fp64; momentum and moments run on."""
    held, stated = tiny(blocks=1, dtype=torch.float64), tiny(blocks=1, dtype=torch.float64)
    optimizer, other = MAKE[name](held), MAKE[name](stated)
    assert isinstance(optimizer, GrassUnbiased) == (name == "Grass-unbiased")
    schedule, plain = scheduled(optimizer), scheduled(other)
    TrustRegion(optimizer, lambda: schedule.last_epoch, pull=PULL, steps=CYCLE)
    reference = Stated(stated, other)
    for step in range(15):
        step_of(held, optimizer, schedule, step)
        other.zero_grad()
        stated(token_batch(step, 4)).backward()
        reference.before_step(step)
        other.step()
        plain.step()
    assert worst(held.state_dict(), stated.state_dict()) < 1e-12
    free = tiny(blocks=1, dtype=torch.float64)
    alone = MAKE[name](free)
    lone = scheduled(alone)
    for step in range(15):
        step_of(free, alone, lone, step)
    assert worst(held.state_dict(), free.state_dict()) > 1e-4


def hold(engine: Any) -> TrustRegion:
    return TrustRegion(engine.optimizer, lambda: engine.lr_scheduler.last_epoch, pull=PULL, steps=CYCLE)


def engine_of(name: str, case: str, stage: int, seed: int = 0) -> Any:
    engine = make_engine(name, CASES[case], stage=stage, seed=seed)
    return engine, hold(engine)


def held_run(name: str, case: str, stage: int, folder: str) -> dict[str, Tensor]:
    engine, trust_region = engine_of(name, case, stage)
    train(engine, 0, 6)
    save_checkpoint(engine, Path(folder), trust_region.state())
    train(engine, 6, 10)
    weights = weights_of(engine)
    finish(engine)
    return weights


def continued_run(name: str, case: str, stage: int, folder: str) -> dict[str, Tensor]:
    """Go on in the middle of a cycle, in an engine that has trained on something else."""
    engine, trust_region = engine_of(name, case, stage, seed=7)
    train(engine, 99, 100)
    trust_region.load_state(load_checkpoint(engine, Path(folder)))
    assert trust_region.position == 2
    train(engine, 6, 10)
    weights = weights_of(engine)
    finish(engine)
    return weights


@pytest.mark.quick("Grass-columns-3", "GaLore-1")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", ["Grass-columns", "GaLore", "Lamb", "AdamW"])
def test_engines_agree_and_go_on_within_a_cycle(
    two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, case: str, stage: int
) -> None:
    """The ``ddp`` engine, whose optimizers step as in plain PyTorch, against ZeRO; with accumulation and clipping."""
    expected = one_rank.run(held_run, "ddp", case, 0, str(tmp_path / "ddp"))[0]
    found = two_ranks.run(held_run, "deepspeed", case, stage, str(tmp_path / "zero"))[0]
    assert worst(found, expected) < 5e-5
    assert worst(two_ranks.run(continued_run, "deepspeed", case, stage, str(tmp_path / "zero"))[0], found) == 0.0
    assert worst(two_ranks.run(continued_run, "deepspeed", case, stage, str(tmp_path / "ddp"))[0], expected) < 5e-5
    assert worst(one_rank.run(continued_run, "ddp", case, 0, str(tmp_path / "zero"))[0], expected) < 5e-5


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (1, {"engine": "ddp", "zero_optimization": {"stage": 0}}),
    "ZeRO-1": (2, {"zero_optimization": {"stage": 1}}),
    "ZeRO-2, state on the CPU": (2, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}),
    "ZeRO-3": (2, {"zero_optimization": {"stage": 3}}),
    "megatron": (2, under_megatron(tensor_parallel=2)),
}


@pytest.mark.quick("ddp")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_bit_for_bit(corpus: Path, tmp_path: Path, name: str) -> None:
    """Stopped after the sixth step, in the middle of the second cycle and after a refresh."""
    ranks, changes = RUNS[name]
    found = []
    for folder, last in (("whole", None), ("cut", 6)):
        (tmp_path / folder).mkdir()
        path = tiny_config(corpus, tmp_path / folder, **changes)
        config = json.loads(path.read_text())
        region = {"pull": PULL, "steps": CYCLE}
        config["training"] |= {"steps": 10, "checkpoint_interval": 2, "lr_schedule": None, "trust_region": region}
        path.write_text(json.dumps(config))
        for words in [["--set", f"training.steps={last}"], []] if last else [[]]:
            result = forked.run("train", str(path), *words, ranks=ranks)
            assert result.returncode == 0, result.stderr
        found.append(losses(path.parent / "run"))
    assert found[0] == found[1]
    assert len(found[0]) == 10


def test_bad_numbers_and_another_cycle_are_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"pull: expected a number of at least 0 and of at most 1, got 1\.5"):
        TrustRegion(optimizer, lambda: 0, pull=1.5)
    with pytest.raises(ValueError, match="steps: expected an integer of at least 1, got 0"):
        TrustRegion(optimizer, lambda: 0, steps=0)
    with pytest.raises(ValueError, match="trust region: expected steps 10, got 4"):
        TrustRegion(optimizer, lambda: 0).load_state({"steps": 4, "position": 0, "num_refreshes": 0})
    with pytest.raises(ValueError, match="subspaces that change after a step"):
        TrustRegion(GaLore(tiny(blocks=1), rank=4, projector="svd", reference_compatible=True), lambda: 0)
