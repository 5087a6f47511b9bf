"""Stacked experts in the engines: every ZeRO stage and ddp on two ranks against plain PyTorch on one process."""

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.backends.deepspeed.traffic import TrafficCounter
from narrowgauge.engine.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.protocol import TrainingEngine
from narrowgauge.engine.report.parameters import count_parameters
from narrowgauge.engine.report.summary import optimizer_state_bytes
from narrowgauge.optimizers import GaLore
from narrowgauge.optimizers.layers.plain import plain_parameters
from tests.support.mixture import TinyMixture, is_compact, is_transposed, mixture, mixture_batch
from tests.support.mixture_references import second_statement
from tests.support.ranks import RankPool
from tests.support.references.grass import ReferenceGrass
from tests.support.zero import worst

STEPS, SAVED_AFTER, MICRO_BATCHES, CLIP = 10, 5, 2, 0.2
PARAMS: dict[str, Any] = {"lr": 1e-2, "density": 0.3, "refresh_interval": 4, "weight_decay": 0.1}
GALORE: dict[str, Any] = {"lr": 1e-2, "rank": 1, "refresh_interval": 4, "weight_decay": 0.1, "projector": "svd"}
# signSGD's steps turn where a gradient of the remainder is zero but for rounding.
FRUGAL: dict[str, Any] = {"density": 0.3, "selection": "columns", "refresh_interval": 4, "state_free": "SGD"}
ADAM: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "matrix_lr_scale": 0.5, "betas": (0.8, 0.95), "eps": 1e-4}
LARS: dict[str, Any] = {"lr": 1e-1, "weight_decay": 0.1, "matrix_lr_scale": 0.5}
SHARDED: dict[str, dict[str, Any]] = {
    "Frugal": {**ADAM, **FRUGAL},
    "Apollo": {**ADAM, "rank": 3, "refresh_interval": 4},
    "Lamb": ADAM,
    "Lars": {**LARS, "momentum": 0.8, "trust_coefficient": 0.1},
}
ENGINES = [("ddp", 0), *(("deepspeed", stage) for stage in range(4))]


class Model(TinyMixture):
    """Called as a Hugging Face model."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return SimpleNamespace(loss=super().forward(input_ids))


def make_engine(engine: str, stage: int, kind: str, optimizer: dict[str, Any], seed: int = 0) -> Any:
    config = load_config(
        {
            "engine": engine,
            "train_batch_size": 8,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": CLIP,
            # Of the experts, some weights and some compact values are kept gathered.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 500},
            "optimizer": optimizer,
            "steps_per_print": 1 << 40,
        }
    )
    backend = backend_of(engine)
    backend.check(config)
    model = Model(kind)
    model.load_state_dict(mixture(kind, seed).state_dict())
    return backend.build(config, model, schedule=lambda opt: LambdaLR(opt, lambda step: 1.0))


def micro_batches(step: int) -> Iterator[Tensor]:
    for micro_batch in mixture_batch(step).chunk(MICRO_BATCHES):
        yield micro_batch.chunk(dist.get_world_size())[dist.get_rank()]


def train(engine: TrainingEngine, first: int, last: int) -> list[float]:
    """The mean losses over all ranks."""
    losses = []
    for step in range(first, last):
        loss = engine.train_step(micro_batches(step), lambda name: nullcontext())
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size() / MICRO_BATCHES)
    return losses


def weights_of(engine: Any) -> dict[str, Tensor]:
    engine.before_save()
    return {name: value.detach().clone() for name, value in engine.whole_weights()}


def trained(engine: str, stage: int, kind: str, optimizer: dict[str, Any], folder: str) -> dict[str, Any]:
    """A run, and a second one from its checkpoint in the middle that ends alike."""
    torch.manual_seed(0)
    first = make_engine(engine, stage, kind, optimizer)
    losses = train(first, 0, SAVED_AFTER)
    save_checkpoint(first, Path(folder), {})
    losses += train(first, SAVED_AFTER, STEPS)
    found = {"losses": losses, "weights": weights_of(first), "share": first.own_optimizer.coverage.share}
    first.close()
    del first
    gc.collect()
    second = make_engine(engine, stage, kind, optimizer, seed=1)
    load_checkpoint(second, Path(folder))
    found["resumed"] = train(second, SAVED_AFTER, STEPS)
    found["difference"] = worst(weights_of(second), found["weights"])
    second.close()
    del second
    gc.collect()
    return found


def reference(kind: str, side: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, and the weights at the end and where the engines save."""
    model = mixture(kind)
    optimizer = ReferenceGrass(
        model,
        is_matrix=is_compact,
        is_transposed=lambda name: is_transposed(model, name),
        side=side,
        **PARAMS,
    )
    return plain_run(model, lambda: optimizer.step(CLIP))


def plain_galore(kind: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """GaLore itself, which is compared with a second statement elsewhere, on one process."""
    model = mixture(kind)
    optimizer = GaLore(model, **GALORE)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()

    return plain_run(model, update)


def unstacked(kind: str, optimizer: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """By second statements, for which each expert has parameters of its own."""
    model = mixture(kind)
    step = second_statement(model, optimizer, SHARDED[optimizer])

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        step()

    return plain_run(model, update)


def plain_run(
    model: TinyMixture, update: Callable[[], object]
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    losses, saved = [], {}
    for step in range(STEPS):
        if step == SAVED_AFTER:
            saved = {name: value.clone() for name, value in model.state_dict().items()}
        total = 0.0
        for micro_batch in mixture_batch(step).chunk(MICRO_BATCHES):
            loss = model(micro_batch) / MICRO_BATCHES
            loss.backward()
            total += float(loss.detach())
        update()
        model.zero_grad()
        losses.append(total)
    return losses, model.state_dict(), saved


@pytest.mark.quick("mixtral-columns-deepspeed-3", "nemotron_h-rows-deepspeed-2")
@pytest.mark.parametrize(("engine", "stage"), ENGINES)
@pytest.mark.parametrize(
    ("kind", "side"), [("mixtral", "columns"), ("gpt_oss", "rows"), ("llama4", "columns"), ("nemotron_h", "rows")]
)
def test_two_ranks_equal_plain_pytorch_and_resume(
    two_ranks: RankPool, tmp_path: Path, kind: str, side: str, engine: str, stage: int
) -> None:
    optimizer = {"type": "Grass", "params": {**PARAMS, "side": side}}
    check(two_ranks, tmp_path, kind, engine, stage, optimizer, reference(kind, side))


@pytest.mark.quick("gpt_oss-deepspeed-2")
@pytest.mark.parametrize(("engine", "stage"), [("ddp", 0), ("deepspeed", 2), ("deepspeed", 3)])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_galore_on_two_ranks_equals_plain_pytorch_and_resumes(
    two_ranks: RankPool, tmp_path: Path, kind: str, engine: str, stage: int
) -> None:
    """One direction for each expert: more of them than it has tokens would be any."""
    check(two_ranks, tmp_path, kind, engine, stage, {"type": "GaLore", "params": GALORE}, plain_galore(kind))


@pytest.mark.quick("mixtral-Frugal-deepspeed-3", "gpt_oss-Apollo-deepspeed-1", "mixtral-Lamb-ddp-0")
@pytest.mark.parametrize(("engine", "stage"), ENGINES)
@pytest.mark.parametrize("optimizer", SHARDED)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_optimizers_on_full_gradients_treat_each_expert_by_itself(
    two_ranks: RankPool, tmp_path: Path, kind: str, optimizer: str, engine: str, stage: int
) -> None:
    """ZeRO's cuts are within experts; in some steps one has no tokens, or none on one rank."""
    given = {"type": optimizer, "params": SHARDED[optimizer]}
    check(two_ranks, tmp_path, kind, engine, stage, given, unstacked(kind, optimizer))


def losses_of_adamw(last: int) -> list[float]:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.0, "torch_adam": True}}
    engine = make_engine("deepspeed", 3, "mixtral", optimizer)
    losses = train(engine, 0, last)
    engine.close()
    return losses


def test_ranks_may_have_tokens_for_other_experts(two_ranks: RankPool) -> None:
    """transformers' loop calls the activation for each expert that has some: DeepSpeed's ZeRO-3 saw other modules run
    on each rank, and ended in "a disagreement on list length", with its own AdamW too.
    """
    model = mixture("mixtral")
    experts: Any = model.get_submodule("blocks.0.experts")
    assert experts.config._experts_implementation == "eager"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    losses, *_ = plain_run(model, update)
    for found in two_ranks.run(losses_of_adamw, 4):
        assert found == pytest.approx(losses[:4], rel=1e-6)


def resumed(engine: str, stage: int, optimizer: dict[str, Any], folder: str) -> list[float]:
    second = make_engine(engine, stage, "mixtral", optimizer, seed=1)
    load_checkpoint(second, Path(folder))
    losses = train(second, SAVED_AFTER, STEPS)
    second.close()
    return losses


@pytest.mark.parametrize(
    ("optimizer", "stage", "engine", "other"),
    [
        ("Frugal", 3, "deepspeed", 1),
        pytest.param("Apollo", 1, "ddp", 0, marks=pytest.mark.slow),
        pytest.param("Lamb", 2, "deepspeed", 3, marks=pytest.mark.slow),
    ],
)
def test_the_state_of_experts_goes_on_on_one_rank(
    two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, optimizer: str, stage: int, engine: str, other: int
) -> None:
    given = {"type": optimizer, "params": SHARDED[optimizer]}
    found = two_ranks.run(trained, "deepspeed", stage, "mixtral", given, str(tmp_path / "saved"))[0]
    (losses,) = one_rank.run(resumed, engine, other, given, str(tmp_path / "saved"))
    assert losses == pytest.approx(found["losses"][SAVED_AFTER:], rel=1e-6)


def check(
    two_ranks: RankPool, tmp_path: Path, kind: str, engine: str, stage: int, optimizer: dict[str, Any], wanted: Any
) -> None:
    losses, weights, saved = wanted
    for found in two_ranks.run(trained, engine, stage, kind, optimizer, str(tmp_path / "saved")):
        assert found["losses"] == pytest.approx(losses, rel=1e-6)
        assert worst(found["weights"], weights) < 2e-5
        assert found["resumed"] == pytest.approx(losses[SAVED_AFTER:], rel=1e-6)
        assert found["difference"] < 2e-5
        assert found["share"] > 0.9
    (path,) = (tmp_path / "saved").rglob("model.safetensors")
    assert worst(load_file(path), saved) < 2e-5


def expected_sizes(kind: str) -> tuple[int, int]:
    """Elements of the compact values and of all that is trained whole, at density 0.3 of the columns."""
    compact = dense = 0
    for name, parameter in plain_parameters(mixture(kind)):
        if is_compact(name):
            compact += parameter.numel() // parameter.shape[-1] * round(0.3 * parameter.shape[-1])
        else:
            dense += parameter.numel()
    return compact, dense


def measured(optimizer: str, params: dict[str, Any]) -> dict[str, Any]:
    """At ZeRO-2: sizes on this rank, and bytes it sends per step."""
    engine = make_engine("deepspeed", 2, "mixtral", {"type": optimizer, "params": params})
    train(engine, 0, 1)
    counter = TrafficCounter()
    counter.attach()
    for step in (1, 2):
        engine.train_step(micro_batches(step), lambda name: nullcontext())
    counter.detach()
    state, _ = optimizer_state_bytes(engine)
    found = {
        "counts": count_parameters(engine.module, engine.shape_of),
        "state": state,
        "subspace": engine.own_optimizer.subspace_bytes(),
        "reduced": counter.reduced / 2,
        "gathered": counter.gathered / 2,
    }
    engine.close()
    del engine
    gc.collect()
    return found


def test_state_and_traffic_are_as_the_density_says(two_ranks: RankPool) -> None:
    """Moments, masters and gradients are of the compact values only, and all experts have one index."""
    compact, dense = expected_sizes("mixtral")
    total = sum(p.numel() for p in mixture("mixtral").parameters())
    results = two_ranks.run(measured, "Grass", PARAMS)
    for found in results:
        assert found["counts"] == {"total": total, "compact": compact, "dense": dense, "frozen": total - dense}
        # In each of two layers, the indices of the linear and of the experts' two parameters; int64.
        assert found["subspace"] == 2 * (5 + 5 + 3) * 8
        # Two micro-batches are all-reduced, and the values gathered.
        assert found["reduced"] == pytest.approx(2 * 4 * (compact + dense), rel=0.01)
        assert found["gathered"] == pytest.approx(4 * (compact + dense) / 2, rel=0.01)
    # Moments and masters in fp32, with the padding of the flat groups.
    assert sum(found["state"] - found["subspace"] for found in results) == pytest.approx(
        12 * (compact + dense), rel=0.01
    )


@pytest.mark.parametrize("optimizer", ["Frugal", pytest.param("Apollo", marks=pytest.mark.slow)])
def test_state_of_full_gradients_is_as_the_density_or_the_rank_says(two_ranks: RankPool, optimizer: str) -> None:
    """Moments are of the chosen columns of each expert, or of its channels; gradients and masters are whole."""
    chosen, dense = expected_sizes("mixtral")
    sizes = [p.shape for name, p in mixture("mixtral").named_parameters() if is_compact(name)]
    channels = sum(max(size[-2:]) * size[:-2].numel() for size in sizes)
    rank = SHARDED["Apollo"]["rank"]
    moments, summed = (chosen, 0) if optimizer == "Frugal" else (rank * channels, (rank + 2) * channels)
    total = sum(p.numel() for p in mixture("mixtral").parameters())
    results = two_ranks.run(measured, optimizer, SHARDED[optimizer])
    for found in results:
        assert found["reduced"] == pytest.approx(2 * 4 * total + 4 * summed, rel=0.01)
        assert found["gathered"] == pytest.approx(4 * total / 2, rel=0.01)
    state = sum(found["state"] - found["subspace"] for found in results)
    assert state == pytest.approx(8 * (moments + dense) + 4 * total, rel=0.01)
