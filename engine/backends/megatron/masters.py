"""What an optimizer steps under Megatron: fp32 copies of parameters, or this process rank's shards of them.

Megatron's optimizers reduce, cut, copy and gather; the step itself is one torch optimizer's over all that they hold,
also where they are two (experts are cut over other process ranks).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor, nn


@dataclass(frozen=True)
class Master:
    """What stands for a parameter on this process rank.

    Attributes:
        tensor: the one that is stepped.
        start: position of its first element in the flattened parameter; its elements are neighbours there.
    """

    tensor: Tensor
    start: int


class MasterCopies(Protocol):
    """The masters of a model, whoever holds them."""

    def of(self, parameter: nn.Parameter) -> Master | None:
        """This process rank's master of a parameter; None where other ranks hold all of it."""
        ...

    def gather(self, *, now: bool = False) -> None:
        """Gather the parameters over the data-parallel ranks. Collective.

        Args:
            now: also where the next forward would do it.
        """
        ...


class Masters:
    """The masters of all trainable parameters of a model's chunks.

    Args:
        chunks: the wrapped chunks.
        distributed: masters are cut over the data-parallel ranks.
        bf16: parameters are in bf16, masters in fp32; without, parameters or their shards are their own masters.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], *, distributed: bool, bf16: bool) -> None:
        self._chunks, self._distributed = list(chunks), distributed
        self._config = OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            clip_grad=0.0,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=distributed,
        )
        dense, experts = [], []
        for chunk in chunks:
            for parameter in chunk.module.parameters():
                if parameter.requires_grad:
                    (dense if getattr(parameter, "allreduce", True) else experts).append(parameter)
        kinds: list[Any] = []
        self._by_parameter: dict[int, Master] = {}
        held = [(dense, "buffers", _dense_groups)]
        if experts:
            held.append((experts, "expert_parallel_buffers", _expert_groups))
        for parameters, buffers, groups in held:
            with torch.no_grad():  # views of parameters that are stepped are not for autograd
                kind = self._hold(parameters, buffers, *groups(distributed))
            kinds.append(kind)
            self._by_parameter |= {id(p): master for p, master in _masters_of(kind, parameters)}
        self._chained: Any = ChainedOptimizer(kinds)

    def of(self, parameter: nn.Parameter) -> Master | None:
        """This process rank's master of a parameter; None where other ranks hold all of it."""
        return self._by_parameter.get(id(parameter))

    def take_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer that was made from the model's parameters step their masters instead."""
        for group in optimizer.param_groups:
            masters = [self.of(parameter) for parameter in group["params"]]
            group["params"] = [master.tensor for master in masters if master is not None]

    def collect_gradients(self) -> float:
        """Give the masters the reduced gradients; returns the norm of all of them. Collective."""
        self._chained.prepare_grads()
        return float(self._chained.get_grad_norm())

    @torch.no_grad()
    def to_model(self) -> None:
        """The parameters become the rounded masters, on this rank as far as it holds them."""
        for kind in self._chained.chained_optimizers:
            if not isinstance(kind, FP32Optimizer):
                kind._copy_main_params_to_model_params()

    @torch.no_grad()
    def from_model(self) -> None:
        """The masters become copies of the parameters."""
        self._chained.reload_model_params()

    def gather(self, *, now: bool = False) -> None:
        """Gather the parameters over the data-parallel ranks. Collective.

        Args:
            now: also where the next forward would do it.
        """
        if not self._distributed:
            return
        for chunk in self._chunks:
            if now or not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=now)

    def forget_gradients(self) -> None:
        self._chained.zero_grad()
        for chunk in self._chunks:
            chunk.zero_grad_buffer()

    def _hold(self, parameters: list[nn.Parameter], buffers: str, data_group: Any, stats_group: Any) -> Any:
        # Holds what is stepped, and is never stepped itself.
        holder = torch.optim.AdamW([{"params": parameters}])

        def no_state(*args: Any) -> None:
            """The state is the stepping optimizer's."""

        if self._distributed:
            kind: Any = DistributedOptimizer(
                holder,
                self._config,
                None,  # pyright: ignore[reportArgumentType] (bf16 and fp32 need no scaler)
                no_state,
                model_chunks=self._chunks,  # pyright: ignore[reportArgumentType]
                per_model_buffers={number: getattr(chunk, buffers) for number, chunk in enumerate(self._chunks)},
                data_parallel_group=data_group,
                data_parallel_group_gloo=None,
                data_parallel_group_idx=0,
                distributed_optimizer_instance_id=0,
            )
        elif self._config.bf16:
            kind = Float16OptimizerWithFloat16Params(holder, self._config, None, no_state)  # pyright: ignore[reportArgumentType]
        else:
            kind = FP32Optimizer(holder, self._config, no_state)
        kind.grad_stats_parallel_group = stats_group
        kind.tp_group = parallel_state.get_tensor_model_parallel_group()
        return kind


def _masters_of(kind: Any, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Master]]:
    for parameter in parameters:
        if not isinstance(kind, DistributedOptimizer):
            yield parameter, Master(getattr(parameter, "main_param", parameter), 0)
        elif parameter in kind.model_param_group_index_map:
            group, order = kind.model_param_group_index_map[parameter]
            span = kind._get_model_param_range_map(parameter)["param"]
            yield parameter, Master(kind.optimizer.param_groups[group]["params"][order], span.start)


def _dense_groups(distributed: bool) -> tuple[Any, Any]:
    """The process ranks that average gradients, and those over which their norm is summed."""
    return (
        parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
        parallel_state.get_intra_distributed_optimizer_instance_group()
        if distributed
        else parallel_state.get_model_parallel_group(),
    )


def _expert_groups(distributed: bool) -> tuple[Any, Any]:
    return (
        parallel_state.get_expert_data_parallel_group(partial_expert_data_parallel=True),
        parallel_state.get_intra_distributed_optimizer_instance_group()
        if distributed
        else parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    )
