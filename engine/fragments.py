"""Which piece of which parameter this process rank's masters and moments belong to, for every ZeRO stage.

The one description that does not depend on how the parameters were cut, so a checkpoint written by some number of
ranks at some stage can be read by another number at another stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class Fragment:
    """A piece of a parameter whose master values this rank updates.

    Attributes:
        name: the parameter's name in the model.
        start: position of the first element within the flattened parameter.
        flat: the tensor the optimizer steps; the key of its state.
        offset: position of the first element within ``flat``.
        length: number of elements.
    """

    name: str
    start: int
    flat: Tensor
    offset: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment of ``flat``, or of a state tensor shaped like it, as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


def local_fragments(engine: Any) -> list[Fragment]:
    """This rank's fragments of all trainable parameters of a DeepSpeed engine, in a fixed order.

    Raises:
        UserError: the engine's optimizer keeps its masters in a form that is not known here.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if isinstance(optimizer, torch.optim.Optimizer):
        return [
            Fragment(engine.param_names[p], 0, p, 0, p.numel())
            for group in optimizer.param_groups
            for p in group["params"]
        ]
    if stage == 3:
        return list(_stage_3(engine, optimizer))
    for groups, flats in (
        ("bit16_groups", "single_partition_of_fp32_groups"),
        ("bf16_groups", "fp32_groups_flat_partition"),
    ):
        if hasattr(optimizer, groups):
            return list(_stage_1_2(engine, getattr(optimizer, groups), getattr(optimizer, flats)))
    raise UserError(
        f"checkpoints of DeepSpeed's {type(optimizer).__name__} are not supported; use ZeRO stage 1, 2 or 3"
    )


def _stage_1_2(engine: Any, groups: list[list[Any]], flats: list[Tensor]) -> Iterator[Fragment]:
    for parameters, flat in zip(groups, flats, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(engine.param_names[parameter], low.start, flat, high.start, high.numel)


def _stage_3(engine: Any, optimizer: Any) -> Iterator[Fragment]:
    for group, parameters in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[group]
        for parameter in parameters:
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * parameter.ds_zero_partition_rank
            length = max(0, min(size, parameter.ds_numel - start))
            if length:
                yield Fragment(engine.param_names[parameter], start, flat, int(offset), length)


@torch.no_grad()
def masters_to_model(engine: Any) -> None:
    """Make the model's parameters, on all ranks, the rounded copies of the masters. Collective."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
