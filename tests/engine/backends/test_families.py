"""A step of Grass from scratch, for the families of transformers, sharded against plain PyTorch."""

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from narrowgauge.engine import initialize
from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.config.run_blocks import ModelBlock
from narrowgauge.optimizers import Grass
from tests.support.families import small
from tests.support.ranks import RankPool
from tests.support.zero import full_weights

FAMILIES = [
    "llama",
    "gpt2",
    "mamba",
    "mixtral",
    "opt",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "mistral",
    "qwen2",
    "phi",
    "phi3",
    "gpt_neox",
    "gptj",
    "gpt_bigcode",
    "bloom",
    "falcon",
    "olmo2",
    "olmo3",
    "stablelm",
    "starcoder2",
    "cohere",
    "cohere2",
    "granite",
    "nemotron",
    "gpt_oss",
    "olmoe",
    "granitemoe",
    "glm",
    "glm4",
    "glm4_moe",
    "smollm3",
    "arcee",
    "nanochat",
]
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
    optimizer.step()
    return float(loss.detach()), before, model.state_dict()


def sharded_step(family: str, stage: int) -> tuple[float, dict[str, Tensor]]:
    model, config = constructed(family, "deepspeed", stage)
    engine, *_ = initialize(model=model, config=config)
    own = batch().chunk(dist.get_world_size())[dist.get_rank()]
    loss = engine(input_ids=own, labels=own).loss
    engine.backward(loss)
    engine.step()
    mean = loss.detach().double()
    dist.all_reduce(mean)
    weights = {name: value.float() for name, value in full_weights(engine).items()}
    engine.destroy()
    gc.collect()
    return float(mean) / dist.get_world_size(), weights


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_step_is_that_of_plain_pytorch(two_ranks: RankPool, family: str, stage: int) -> None:
    loss, before, expected = plain_step(family)
    for found_loss, found in two_ranks.run(sharded_step, family, stage):
        assert found_loss == pytest.approx(loss, rel=1e-4)
        assert found.keys() <= expected.keys()
        for name, value in found.items():
            step = (expected[name] - before[name]).abs().max()
            assert float((value - expected[name]).abs().max()) <= 1e-3 * float(step) + 1e-6, name
