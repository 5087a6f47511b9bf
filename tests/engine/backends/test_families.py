"""A step of Grass from scratch, for every family of transformers that trains, sharded against plain PyTorch."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from narrowgauge.engine import initialize
from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.backends.deepspeed.training import DeepSpeedTraining
from narrowgauge.engine.checkpoint.checkpoint import save_checkpoint
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.config.run_blocks import ModelBlock
from narrowgauge.engine.run.export import export_run
from narrowgauge.engine.run.head import model_block
from narrowgauge.engine.run_folder import CHECKPOINTS
from narrowgauge.optimizers import Grass
from tests.support.families import small
from tests.support.family_record import describe, recorded
from tests.support.ranks import RankPool
from tests.support.zero import full_weights

FAMILIES = [family for family, found in recorded().items() if "share" in found]
QUICK = ("llama", "gpt2", "mamba", "mixtral", "opt")
# With such an eps a step is as long as its gradient, and where that is rounding noise it is short.
PARAMS: dict[str, Any] = {"lr": 1.0, "eps": 1.0, "density": 0.25, "refresh_interval": 5, "min_compact_share": 0.0}


def constructed(family: str, engine: str, stage: int = 0) -> tuple[Any, Any]:
    raw = {
        "engine": engine,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Grass", "params": PARAMS},
        "training": {"steps": 1, "seed": 5},
        "gradient_clipping": 1e9,
        "steps_per_print": 1 << 40,
    }
    config = load_config(raw)
    block = ModelBlock(config={"model_type": family})
    return backend_of(engine).construct(block, small(family), config), config


def batch() -> Tensor:
    return torch.randint(3, 300, (2, 32), generator=torch.Generator().manual_seed(3))


def plain_step(family: str) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """The loss, and the weights before and after."""
    model, _ = constructed(family, "ddp")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = Grass(model, **PARAMS)
    tokens = batch()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    # An engine counts a missing gradient as zero: decay goes on.
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    return float(loss.detach()), before, model.state_dict()


def sharded_step(family: str, stage: int, run_dir: str) -> tuple[float, dict[str, Tensor]]:
    """The loss and the weights after the step, which are also saved as a run does."""
    model, config = constructed(family, "deepspeed", stage)
    engine, *_ = initialize(model=model, config=config)
    own = batch().chunk(dist.get_world_size())[dist.get_rank()]
    loss = engine(input_ids=own, labels=own).loss
    engine.backward(loss)
    engine.step()
    mean = loss.detach().double()
    dist.all_reduce(mean)
    weights = {name: value.float() for name, value in full_weights(engine).items()}
    training = DeepSpeedTraining(engine)
    save_checkpoint(training, Path(run_dir) / CHECKPOINTS / "step-1", {"model": model_block(training)})
    engine.destroy()
    gc.collect()
    return float(mean) / dist.get_world_size(), weights


def logits_of(model: Any) -> Tensor:
    model.eval().config.use_cache = False
    with torch.no_grad():
        return model(input_ids=batch()).logits


def check_step(ranks: RankPool, family: str, stage: int, folder: Path) -> None:
    loss, before, expected = plain_step(family)
    ranks_found = ranks.run(sharded_step, family, stage, str(folder / "run"))
    for found_loss, found in ranks_found:
        assert found_loss == pytest.approx(loss, rel=1e-4)
        assert found.keys() <= expected.keys()
        for name, value in found.items():
            step = (expected[name] - before[name]).abs().max()
            assert float((value - expected[name]).abs().max()) <= 1e-3 * float(step) + 1e-6, name
    export_run(folder / "run", folder / "exported")
    exported = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
    trained: Any = AutoModelForCausalLM.from_config(small(family), dtype=torch.float32)
    trained.load_state_dict(ranks_found[0][1], strict=False)
    assert torch.equal(logits_of(exported), logits_of(trained))


@pytest.mark.quick("gpt2-3", "llama-1", "mixtral-3", "mamba-1")
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_step_is_that_of_plain_pytorch_and_is_exported(
    two_ranks: RankPool, family: str, stage: int, tmp_path: Path
) -> None:
    check_step(two_ranks, family, stage, tmp_path)


def test_the_sweep_is_wide() -> None:
    assert len(FAMILIES) >= 120


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in recorded()]
)
def test_the_record_of_families_is_current(family: str) -> None:
    assert describe(family) == recorded()[family], "run: python -m tests.support.family_record"
