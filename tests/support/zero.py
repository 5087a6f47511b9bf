"""Running Grass under DeepSpeed ZeRO inside a pool of process ranks."""

import gc
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from narrowgauge.engine import initialize
from narrowgauge.optimizers.layers.plain import plain_parameters
from tests.support.models import TinyTransformer, is_matrix, tiny, token_batch
from tests.support.references.grass import ReferenceGrass

ACCUMULATION, CLIP = 2, 0.2
PARAMS: dict[str, Any] = {
    "lr": 1e-2,
    "density": 0.3,
    "refresh_interval": 7,
    "weight_decay": 0.1,
    "matrix_lr_scale": 0.5,
    "param_groups": [{"params": ["*norm*", "*.bias"], "weight_decay": 0.0}],
}


def options_of(name: str) -> dict[str, float]:
    """The same groups for the reference."""
    return {"weight_decay": 0.0} if "norm" in name or name.endswith(".bias") else {}


def ds_config(stage: int, *, global_batch: int = 8, **overrides: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with Grass; ``zero`` and ``params`` in the overrides extend those blocks."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 500, **overrides.pop("zero", {})}
    return {
        "train_batch_size": global_batch,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "optimizer": {"type": "Grass", "params": {**PARAMS, **overrides.pop("params", {})}},
        "steps_per_print": 1 << 40,
        **overrides,
    }


def make_engine(config: dict[str, Any], *, zero_init: bool = False, seed: int = 0, **sizes: Any) -> Any:
    model = built_under_zero_init(config, seed) if zero_init else tiny(seed=seed, **sizes)
    engine, *_ = initialize(model=model, config=config)
    return engine


def built_under_zero_init(config: dict[str, Any], seed: int) -> TinyTransformer:
    """A model whose parameters were sharded as they were made, with the weights that ``tiny(seed)`` has."""
    plain = {k: v for k, v in config.items() if k != "optimizer"}
    with deepspeed.zero.Init(config_dict_or_path=plain):
        model = TinyTransformer()
    for parameter, wanted in zip(model.parameters(), tiny(seed=seed).parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(wanted.data)
    return model


def train_step(engine: Any, step: int, global_batch: int = 8) -> float:
    """One optimizer step on this rank's part of the global batch; returns the mean loss over all ranks."""
    total = 0.0
    for micro_batch in token_batch(step, global_batch).chunk(engine.gradient_accumulation_steps()):
        own = micro_batch.chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine(own)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        total += float(mean) / dist.get_world_size() / engine.gradient_accumulation_steps()
    return total


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The plain weights on every rank."""
    if engine.zero_optimization_stage() < 3:
        return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
    if hasattr(engine, "write_back"):
        engine.write_back()
    found = {}
    for name, parameter in plain_parameters(engine.module):
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def reference_run(steps: int, dtype: torch.dtype = torch.float32, **params: Any) -> tuple[list[float], Any]:
    """Losses and weights of one process on the whole batch, by the second statement of Grass."""
    options = {k: v for k, v in {**PARAMS, **params}.items() if k != "param_groups"}
    block = options.pop("selection", "uniform") == "block"
    model = tiny(dtype=dtype)
    reference = ReferenceGrass(model, is_matrix=is_matrix, options_of=options_of, block=block, **options)
    return plain_steps(model, steps, lambda: reference.step(CLIP)), model.state_dict()


def plain_steps(model: torch.nn.Module, steps: int, update: Callable[[], object]) -> list[float]:
    """The losses of one process on the whole batches; ``update`` clips and makes the step."""
    return [plain_step(model, step, update) for step in range(steps)]


def plain_step(model: torch.nn.Module, step: int, update: Callable[[], object]) -> float:
    total = 0.0
    for micro_batch in token_batch(step, 8).chunk(ACCUMULATION):
        loss = model(micro_batch) / ACCUMULATION
        loss.backward()
        total += float(loss.detach())
    update()
    model.zero_grad()
    return total


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a parameter."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


def finish(engine: Any) -> None:
    engine.destroy()
    gc.collect()
