"""What a run was and what it saved: the figures of ``summary.json``."""

import math
from collections import Counter

import psutil
import torch
from torch import Tensor

from ..protocol import TrainingEngine
from .dense_traffic import trained_when_dense
from .heap import HeapMeter

SCHEMA_VERSION = 1


def _numel(engine: TrainingEngine, parameter: Tensor) -> int:
    return math.prod(engine.shape_of(parameter))


def optimizer_state_bytes(engine: TrainingEngine) -> tuple[int, int]:
    """This rank's bytes of moments, subspaces and masters, and those of dense AdamW on the same model and layout."""
    flats = {id(shard.flat): shard.flat for shard in engine.shards()}
    states, layout = engine.optimizer.state, engine.memory_layout()
    state = sum(
        value.numel() * value.element_size()
        for flat in flats.values()
        for value in states.get(flat, {}).values()
        if torch.is_tensor(value)
    )
    state += engine.own_optimizer.subspace_bytes() if engine.own_optimizer is not None else 0
    masters = sum(f.numel() * f.element_size() for f in flats.values()) if layout.has_masters else 0
    per_element = 8 + (4 if layout.has_masters else 0)
    by_shares: Counter[int] = Counter()
    for parameter in trained_when_dense(engine.module):
        by_shares[layout.num_shares(parameter)] += _numel(engine, parameter)
    return state + masters, sum(numel * per_element // shares for shares, numel in by_shares.items())


def traffic_bytes(engine: TrainingEngine, *, reduced: float, gathered: float) -> dict[str, float]:
    """Per step and rank: bytes counted, and what dense AdamW would send on the same model and layout."""
    dense_reduced, dense_gathered = engine.dense_traffic(gathered=gathered)
    return {
        "reduced_per_step": round(reduced),
        "gathered_per_step": round(gathered),
        "reduced_per_step_dense": round(dense_reduced),
        "gathered_per_step_dense": round(dense_gathered),
    }


def peak_memory() -> int:
    """The most memory this rank has held: of its GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tensor_memory(heap: HeapMeter) -> int:
    """The most bytes in tensors: on a GPU those of the whole run; else what the process was given in its first steps,
    without what it had before the model. 0 where it is not known.
    """
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else heap.peak or 0


def resident_memory() -> int | None:
    """What the process holds now, where :func:`peak_memory` is of the process; None on a GPU."""
    return None if torch.cuda.is_available() else memory_now()


def memory_now() -> int:
    """What this rank holds now: allocated on its GPU, or resident of the process where there is none."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def max_over_ranks(value: float, device: torch.device) -> float:
    tensor: Tensor = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return float(tensor)
