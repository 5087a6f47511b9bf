"""What a run was and what it saved: the figures of ``summary.json``."""

from typing import Any

import torch
from torch import Tensor

from narrowgauge.optimizers.layers.compact import CompactWeight
from narrowgauge.optimizers.layers.plain import plain_parameters

from ..backends.deepspeed.shards import local_shards
from ..backends.deepspeed.traffic import dense_traffic, dense_traffic_zero3

SCHEMA_VERSION = 1


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Numbers of elements: ``total`` as the user knows the model, of which ``frozen`` in weights that are trained
    through ``compact`` ones
    or not at all; ``dense`` are trained whole."""
    plain = list(plain_parameters(model))
    return {
        "total": sum(_numel(p) for _, p in plain),
        "dense": sum(_numel(p) for _, p in plain if p.requires_grad),
        "compact": sum(_numel(m.compact) for m in model.modules() if isinstance(m, CompactWeight)),
        "frozen": sum(_numel(p) for _, p in plain if not p.requires_grad),
    }


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _trained_when_dense(model: torch.nn.Module) -> list[Any]:
    """The parameters that dense AdamW would train: those that are trained, and the weights that compact ones stand
    for.
    """
    weights = {id(m.weight) for m in model.modules() if isinstance(m, CompactWeight)}
    return [p for _, p in plain_parameters(model) if p.requires_grad or id(p) in weights]


def optimizer_state_bytes(engine: Any) -> tuple[int, int]:
    """This rank's bytes of moments, subspaces and masters, and those of dense AdamW on the same model and stage."""
    flats = {id(shard.flat): shard.flat for shard in local_shards(engine)}
    states = engine.basic_optimizer.state
    state = sum(
        value.numel() * value.element_size()
        for flat in flats.values()
        for value in states.get(flat, {}).values()
        if torch.is_tensor(value)
    )
    own = getattr(engine, "own_optimizer", None)
    state += own.subspace_bytes() if own is not None else 0
    masters = sum(f.numel() * f.element_size() for f in flats.values()) if _has_masters(engine) else 0
    stage = engine.zero_optimization_stage()
    share = engine.dp_world_size if stage else 1
    per_element = 8 + (4 if _has_masters(engine) else 0)
    dense = sum(map(_numel, _trained_when_dense(engine.module))) * per_element // share
    return state + masters, dense


def _has_masters(engine: Any) -> bool:
    """Whether the optimizer steps copies of the parameters (ZeRO-3 in fp32 without offload steps its shards
    themselves).
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return False
    return stage < 3 or engine.bfloat16_enabled() or engine.fp16_enabled() or engine.optimizer.offload_optimizer


def traffic_bytes(engine: Any, reduced: float, gathered: float) -> dict[str, float]:
    """Per step and rank: bytes counted, and what dense AdamW would send on the same model and stage."""
    stage, size, steps = engine.zero_optimization_stage(), engine.dp_world_size, engine.gradient_accumulation_steps()
    dense_parameters = _trained_when_dense(engine.module)
    element = torch.finfo(dense_parameters[0].dtype).bits // 8
    trainable = element * sum(map(_numel, dense_parameters))
    reduced_as = torch.finfo(engine.communication_data_type).bits // 8 / element
    if stage < 3:
        dense = dense_traffic(stage=stage, parameter_bytes=trainable, world_size=size, accumulation_steps=steps)
    else:
        everything = list(engine.module.parameters())
        plain = [p for _, p in plain_parameters(engine.module)]
        dense = dense_traffic_zero3(
            gathered=gathered,
            current=[(element * _numel(p), p.ds_persist) for p in everything],  # pyright: ignore
            dense=[(element * _numel(p), p.ds_persist) for p in plain],
            trainable_bytes=trainable,
            world_size=size,
            accumulation_steps=steps,
        )
    return {
        "reduced_per_step": round(reduced),
        "gathered_per_step": round(gathered),
        "reduced_per_step_dense": round(dense[0] * reduced_as),
        "gathered_per_step_dense": round(dense[1]),
    }


def peak_memory() -> int:
    """The most memory this rank has held: of its GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def max_over_ranks(value: float, device: Any) -> float:
    tensor: Tensor = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return float(tensor)
