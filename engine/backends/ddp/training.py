"""Plain PyTorch as :class:`narrowgauge.engine.protocol.TrainingEngine`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from narrowgauge.offload import ActivationOffload
from narrowgauge.optimizers import EngineOptimizer
from narrowgauge.optimizers.sharding.shards import Shard

from ...checkpoint import weights
from ...config.config import Batches
from ...micro_batch import Batch, micro_batch_of
from ...protocol import MemoryLayout, ParallelGroup, Phase, WeightSource
from ...report.dense_traffic import dense_traffic, trained_when_dense
from ...report.parameters import count_parameters
from ..gradient_norm import gradient_norm
from .traffic import DdpTraffic

_CLIPPING_EPSILON = 1e-6


class DdpTraining:
    """A model, whole on every process rank, whose gradients DistributedDataParallel averages.

    Every trainable parameter must get a gradient in every backward: DistributedDataParallel waits for it. The optimizer
    finishes its own steps, as in plain PyTorch: it folds, counts and refreshes within ``step``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        traffic: DdpTraffic,
        *,
        lr_scheduler: Any,
        batches: Batches,
        gradient_clipping: float,
        offload: ActivationOffload | None,
    ) -> None:
        """
        Args:
            optimizer: made from the model, which it may have converted.
            gradient_clipping: of the norm of all gradients; 0 for none.
        """
        self._model, self._optimizer, self._traffic = model, optimizer, traffic
        self._lr_scheduler, self._batches, self._clipping, self._offload = (
            lr_scheduler,
            batches,
            gradient_clipping,
            offload,
        )
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._device = next(model.parameters()).device
        self._counters = {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}
        self._grad_norm: float | None = None
        self._wrapper: DistributedDataParallel | None = None
        if dist.get_world_size() > 1:
            # Buffers are equal on all ranks, or the model's own affair, as under DeepSpeed.
            self._wrapper = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            self._wrapper.register_comm_hook(dist.group.WORLD, traffic.reduce_bucket)

    @property
    def module(self) -> nn.Module:
        return self._model

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    @property
    def own_optimizer(self) -> EngineOptimizer | None:
        return self._optimizer if isinstance(self._optimizer, EngineOptimizer) else None

    @property
    def lr_scheduler(self) -> Any:
        return self._lr_scheduler

    @property
    def data_parallel(self) -> ParallelGroup:
        return ParallelGroup(dist.get_rank(), dist.get_world_size())

    @property
    def accumulation_steps(self) -> int:
        return self._batches.accumulation_steps

    @property
    def activation_offload(self) -> ActivationOffload | None:
        return self._offload

    @property
    def traffic(self) -> DdpTraffic:
        return self._traffic

    @property
    def description(self) -> str:
        return "DDP"

    @property
    def zero_stage(self) -> int:
        return 0

    @property
    def forward_is_collective(self) -> bool:
        return False

    @property
    def state_is_replicated(self) -> bool:
        return True

    def train_step(self, batches: Iterator[Batch], phase: Phase) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        for number in range(self.accumulation_steps):
            batch = micro_batch_of(next(batches)).to(self._device)
            with self._reduced(number == self.accumulation_steps - 1):
                with phase("forward"), self._offload or nullcontext():
                    loss = (self._wrapper or self._model)(**batch.inputs()).loss * batch.weight
                with phase("backward"):
                    (loss / self.accumulation_steps).backward()
            loss_sum += loss.detach()
        with phase("optimizer"):
            self._update()
        return loss_sum

    def _reduced(self, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed up on each rank until the last micro-batch."""
        return nullcontext() if is_last or self._wrapper is None else self._wrapper.no_sync()

    @torch.no_grad()
    def _update(self) -> None:
        """Clip and step, as DeepSpeed does without ZeRO: a gradient that is missing is zero, and a step with gradients
        that are not finite is left out.
        """
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        norm = gradient_norm(gradients)
        self._grad_norm = float(norm)
        self._counters["global_steps"] += 1
        self._counters["global_samples"] += self._batches.total
        if math.isfinite(self._grad_norm):
            if self._clipping > 0.0:
                scale = (self._clipping / (norm + _CLIPPING_EPSILON)).clamp(max=1.0)
                for gradient in gradients:
                    gradient.mul_(scale)
            self._optimizer.step()
            if self._lr_scheduler is not None:
                self._lr_scheduler.step()
        else:
            self._counters["skipped_steps"] += 1
            if self.own_optimizer is not None:
                self.own_optimizer.forget_observed()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        self._model.eval()
        loss = self._model(**micro_batch_of(batch).to(self._device).inputs()).loss
        self._model.train()
        return loss

    def step_metrics(self) -> Mapping[str, Any]:
        return {}

    def generate(self, tokens: Tensor, *, before_forward: Callable[[], None], **options: Any) -> Tensor:
        model: Any = self.module
        with model.register_forward_pre_hook(lambda *_: before_forward(), prepend=True):
            return model.generate(tokens, **options)

    def grad_norm(self) -> float | None:
        return self._grad_norm

    def shards(self) -> Sequence[Shard]:
        return [
            Shard(self._names[id(p)], tuple(p.shape), 0, p.numel(), p, 0)
            for group in self._optimizer.param_groups
            for p in group["params"]
        ]

    def saves(self, shard: Shard) -> bool:
        return True

    def trainable_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self._model.named_parameters() if p.requires_grad}

    def subspace_state(self) -> dict[str, Any] | None:
        return self.own_optimizer.subspace_state() if self.own_optimizer is not None else None

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        assert self.own_optimizer is not None
        self.own_optimizer.load_subspace_state(state)

    def parameter_counts(self) -> dict[str, int]:
        return count_parameters(self._model)

    def parameter_groups(self) -> Mapping[str, int]:
        groups = self._optimizer.param_groups
        return {self._names[id(p)]: number for number, group in enumerate(groups) for p in group["params"]}

    def shape_of(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        return nullcontext()

    def local_part(self, parameter: Tensor) -> tuple[Tensor, int]:
        return parameter.detach(), 0

    def before_save(self) -> None:
        """The weights are folded in every step."""

    def masters_to_model(self) -> None:
        """There are no masters."""

    def model_to_masters(self) -> None:
        """There are no masters."""

    def after_load(self) -> None:
        """Nothing is kept gathered."""

    def counters(self) -> dict[str, Any]:
        return dict(self._counters)

    def restore_counters(self, values: Mapping[str, Any]) -> None:
        self._counters = {key: values[key] for key in self._counters}

    def memory_layout(self) -> MemoryLayout:
        return MemoryLayout(has_masters=False, num_shares=lambda parameter: 1)

    def dense_traffic(self, *, gathered: float) -> tuple[float, float]:
        return dense_traffic(
            stage=0,
            parameter_bytes=sum(p.nbytes for p in trained_when_dense(self._model)),
            world_size=dist.get_world_size(),
            accumulation_steps=self.accumulation_steps,
        )

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        return weights.whole_weights(self)

    def load_weights(self, source: WeightSource, *, rebuild_compact: bool) -> None:
        weights.load_weights(self, source, rebuild_compact=rebuild_compact)

    def close(self) -> None:
        self._traffic.detach()
        if self._offload is not None:
            self._offload.close()
