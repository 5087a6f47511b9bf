"""Megatron's process groups as DeepSpeed asks for them, and gradients that tensor-parallel ranks share.

Each process rank waits in collectives of two groups in turn: of its tensor-parallel ranks, in the layers and in hooks
on gradients, and of its data-parallel ranks, in DeepSpeed's reductions and, at stage 3, gathers. None waits for ever,
because all ranks come to all of them in one order: they run the same graph, autograd's order in it is that of its
nodes, DeepSpeed fills its buckets in the order of gradients and gathers in that of modules. What depends on a rank's
own data must not decide whether there is a collective.

What DeepSpeed compiles when it is initialized, its collectives in shared memory on CPUs, is there before: one rank
would compile for minutes, and the others look as if they hung.
"""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..model import StagedModel


class TensorParallel:
    """DeepSpeed's ``mpu`` of a layout without a pipeline: what it calls model-parallel ranks share each matrix."""

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    def get_data_parallel_group(self) -> Any:
        return parallel_state.get_data_parallel_group()


def seen_in_parts(model: StagedModel) -> Iterable[nn.Parameter]:
    """Parameters that each tensor-parallel rank holds whole and uses for a part of the sequence, or of the heads."""
    for held, parameter in model.local_parameters():
        is_of_heads = held.name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        if getattr(parameter, "sequence_parallel", False) or is_of_heads:
            yield parameter


def sum_over_tensor_parallel_ranks(parameters: Iterable[nn.Parameter]) -> None:
    """From now on the gradients of these are summed over the tensor-parallel ranks, in each backward and before
    anything else sees them: Megatron does it once per step, in buffers that DeepSpeed has not.
    """
    group: Any = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_hook(summed)
