"""Bytes that a run would send if all of the model's parameters were trained whole, by the formulas of its layout.

A collective over N ranks on S bytes makes each rank send, by the ring algorithms of NCCL and gloo: all-reduce ``2
(N-1)/N S``, reduce-scatter (S in) and all-gather (S out) ``(N-1)/N S``; a reduce to one rank ``(N-1)/N S`` on
average. gloo has no reduce-scatter of its own: it runs an all-reduce, at twice the bytes.
"""

from collections.abc import Iterable

import torch.distributed
from torch import Tensor, nn

from narrowgauge.optimizers.layers.compact import compact_units
from narrowgauge.optimizers.layers.plain import plain_parameters


def reduce_scatter_factor() -> float:
    """What a reduce-scatter costs, in units of ``(N-1)/N S``, on the process group's backend."""
    return 2.0 if torch.distributed.get_backend() == "gloo" else 1.0


def trained_when_dense(model: nn.Module) -> list[Tensor]:
    """The parameters that dense AdamW would train: those that are trained, and the weights that compact ones stand
    for.
    """
    weights = {id(weight) for unit in compact_units(model) for weight in unit.stored_weights}
    return [p for _, p in plain_parameters(model) if p.requires_grad or id(p) in weights]


def dense_traffic(*, stage: int, parameter_bytes: int, world_size: int, accumulation_steps: int) -> tuple[float, float]:
    """Bytes reduced and gathered per step and rank when all of the model's parameters are trained, ZeRO stages 0 to 2.

    DeepSpeed all-reduces gradient buckets: once per step at stages 0 and 1, once per micro-batch at stage 2. Stages 1
    and 2 gather the updated parameters once per step.
    """
    share = (world_size - 1) / world_size
    reductions = accumulation_steps if stage == 2 else 1
    return 2 * reductions * share * parameter_bytes, (share * parameter_bytes if stage else 0.0)


def dense_traffic_zero3(
    *,
    gathered: float,
    current: Iterable[tuple[int, bool]],
    dense: Iterable[tuple[int, bool]],
    trainable_bytes: int,
    world_size: int,
    accumulation_steps: int,
) -> tuple[float, float]:
    """The same for ZeRO-3, derived from what the current run gathers.

    Gradients are reduce-scattered per micro-batch. A persistent parameter is gathered once per step, any other as often
    as forward and backward ask for it, which is the same in both runs and follows from the bytes counted.

    Args:
        gathered: bytes gathered per step and rank by the current run.
        current, dense: ``(bytes, persistent)`` of each parameter of the current and of the dense model.
        trainable_bytes: of the dense model.
    """
    share = (world_size - 1) / world_size

    def split(parameters: Iterable[tuple[int, bool]]) -> tuple[int, int]:
        parameters = list(parameters)
        return sum(b for b, kept in parameters if kept), sum(b for b, kept in parameters if not kept)

    persistent, others = split(current)
    times = (gathered / share - persistent) / others if share and others else 0.0
    dense_persistent, dense_others = split(dense)
    reduced = reduce_scatter_factor() * accumulation_steps * share * trainable_bytes
    return reduced, share * (dense_persistent + times * dense_others)
