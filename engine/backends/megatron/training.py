"""Megatron as :class:`narrowgauge.engine.protocol.TrainingEngine`."""

# torch's foreach functions have no public names.
# pyright: reportPrivateImportUsage=false

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from narrowgauge.offload import ActivationOffload
from narrowgauge.optimizers import EngineOptimizer
from narrowgauge.optimizers.sharding.shards import Shard

from ...config.config import Batches
from ...micro_batch import Batch, micro_batch_of
from ...protocol import MemoryLayout, ParallelGroup, Phase, WeightSource
from ...report.dense_traffic import trained_when_dense
from .balance import Balance
from .generate import generate
from .groups import destroy_groups
from .installed import fused_by
from .masters import Masters
from .micro_batches import given_of
from .model import StagedModel
from .offload import ScheduledOffload
from .own_part import OwnPart
from .schedule import forward, forward_backward, forward_without_head
from .shards import HeldShard, held_shards
from .traffic import MegatronTraffic, gathered_bytes, reduced_bytes
from .whole import Gathering, read_weights

_CLIPPING_EPSILON = 1e-6


class MegatronTraining:
    """A model that is cut over process ranks, and the optimizer that steps what each of them holds."""

    def __init__(
        self,
        model: StagedModel,
        chunks: Sequence[DistributedDataParallel],
        masters: Masters,
        optimizer: torch.optim.Optimizer,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        lr_scheduler: Any,
        batches: Batches,
        gradient_clipping: float,
        distributed: bool,
        offload: ScheduledOffload,
        own: OwnPart | None = None,
    ) -> None:
        """
        Args:
            own: where the optimizer is one of ours, what it trains of the model.
            chunks: the model's, wrapped.
            optimizer: steps the masters.
            shapes: of all weights, by Hugging Face's names.
            gradient_clipping: of the norm of all gradients; 0 for none.
            distributed: masters and moments are cut over the data-parallel ranks.
            offload: of what training forwards save.
        """
        self._model, self._chunks, self._masters, self._optimizer = model, chunks, masters, optimizer
        self._shapes, self._lr_scheduler, self._batches = shapes, lr_scheduler, batches
        self._clipping, self._distributed, self._own = gradient_clipping, distributed, own
        self._offload = offload
        self._device = next(model.parameters()).device
        self._traffic = MegatronTraffic(chunks)
        self._counters = {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}
        self._grad_norm: float | None = None
        self._balance = Balance(model, batches.accumulation_steps)
        held = [*model.local_parameters(), *(own.parameters if own is not None else ())]
        self._shards: list[Shard] = [*held_shards(held, masters, model.place, distributed=distributed)]
        if own is not None:
            own.take_shards(self._shards)

    @property
    def module(self) -> StagedModel:
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
        group: Any = parallel_state.get_data_parallel_group()
        return ParallelGroup(self._model.place.data, self._model.layout.data, group)

    @property
    def accumulation_steps(self) -> int:
        return self._batches.accumulation_steps

    @property
    def activation_offload(self) -> ActivationOffload | None:
        return self._offload.activation_offload

    @property
    def traffic(self) -> MegatronTraffic:
        return self._traffic

    @property
    def description(self) -> str:
        layout = self._model.layout.describe()
        # What Transformer Engine and apex have in the place of AdamW is called after the class.
        is_fused = type(self._optimizer).__name__ == "FusedAdam"
        parts = [f"the FusedAdam of {fused_by()}"] if is_fused else []
        parts += [kernels] if (kernels := self._model.kernels.describe()) is not None else []
        return f"{layout}, with {' and '.join(parts)}" if parts else layout

    @property
    def zero_stage(self) -> int:
        """The distributed optimizer cuts what ZeRO-1 cuts."""
        return 1 if self._distributed else 0

    @property
    def forward_is_collective(self) -> bool:
        return True

    @property
    def state_is_replicated(self) -> bool:
        return False

    def train_step(self, batches: Iterator[Batch], phase: Phase) -> Tensor:
        own = [next(batches) for _ in range(self.accumulation_steps)]
        micro_batches = given_of(own, self._model.layout, self._model.place, self._device)
        self._masters.forget_gradients()
        self._balance.begin_step()
        with self._traffic.passes():
            if self._balance.needs_counts_ahead:
                with self._balance.counting_ahead():
                    forward_without_head(self._chunks, micro_batches, phase)
            loss_sum = forward_backward(self._chunks, micro_batches, phase, self._offload)
        self._balance.end_step()
        with phase("optimizer"):
            self._update()
        return loss_sum

    @torch.no_grad()
    def _update(self) -> None:
        """Clip and step; a step with gradients that are not finite is left out on all ranks."""
        own = self._own
        if own is not None:
            own.before_step()
        norm = self._masters.collect_gradients()
        self._grad_norm = norm
        self._counters["global_steps"] += 1
        self._counters["global_samples"] += self._batches.total
        if not math.isfinite(norm):
            self._counters["skipped_steps"] += 1
            if own is not None:
                own.own.forget_observed()
            return
        if 0.0 < self._clipping < norm + _CLIPPING_EPSILON:
            # As Megatron's clipping, but for the copy that it makes without apex and Transformer Engine.
            gradients = [master.grad for group in self._optimizer.param_groups for master in group["params"]]
            torch._foreach_mul_(gradients, self._clipping / (norm + _CLIPPING_EPSILON))
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._optimizer.step()
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        self._masters.to_model()
        self._masters.gather()
        if own is not None:
            own.own.after_step(rates)

    def evaluate(self, batch: Batch) -> Tensor:
        with self._parameters_at_rest():
            self._model.eval()
            # At the end of the samples some ranks have fewer than others, with which they may share experts.
            own = micro_batch_of(batch) if self._model.layout.splits_experts else batch
            (given,) = given_of([own], self._model.layout, self._model.place, self._device)
            loss = forward(self._model, given)
            self._model.train()
        return loss

    def generate(self, tokens: Tensor, *, before_forward: Callable[[], None], **options: Any) -> Tensor:
        with self._parameters_at_rest():
            return generate(self._model, tokens, before_forward=before_forward, **options)

    @contextmanager
    def _parameters_at_rest(self) -> Iterator[None]:
        """Whatever the next forward would still gather is gathered before, and no module asks for it inside."""
        with ExitStack() as stack:
            for chunk in self._chunks:
                if chunk.use_forward_hook:
                    chunk.disable_forward_pre_hook()
                    stack.callback(chunk.enable_forward_pre_hook)
            yield

    def step_metrics(self) -> Mapping[str, Any]:
        return self._balance.metrics()

    def grad_norm(self) -> float | None:
        return self._grad_norm

    def shards(self) -> Sequence[Shard]:
        return self._shards

    def saves(self, shard: Shard) -> bool:
        assert isinstance(shard, HeldShard)
        assert shard.parameter is not None
        place, parameter = self._model.place, shard.parameter
        return parameter.is_held_first_by(place) and (self._distributed or parameter.copy_on(place) == 0)

    def trainable_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._own.trainable_shapes(self._shapes) if self._own is not None else self._shapes

    def parameter_groups(self) -> Mapping[str, int]:
        return self._own.groups if self._own is not None else dict.fromkeys(self._shapes, 0)

    def subspace_state(self) -> dict[str, Any] | None:
        return self._own.subspace_state() if self._own is not None else None

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        assert self._own is not None
        self._own.load_subspace_state(state)

    def parameter_counts(self) -> dict[str, int]:
        total = sum(map(math.prod, self._shapes.values()))
        trained = self.trainable_shapes()
        dense = sum(math.prod(shape) for name, shape in trained.items() if name in self._shapes)
        compact = sum(map(math.prod, trained.values())) - dense
        return {"total": total, "dense": dense, "compact": compact, "frozen": total - dense}

    def shape_of(self, parameter: Tensor) -> tuple[int, ...]:
        """Of what this rank holds: the parameters' names and shapes are not the weights'."""
        return tuple(parameter.shape)

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        return nullcontext()

    def local_part(self, parameter: Tensor) -> tuple[Tensor, int]:
        return parameter.detach(), 0

    def before_save(self) -> None:
        self._masters.gather(now=True)
        if self._own is not None:
            self._own.before_save()

    def masters_to_model(self) -> None:
        self._masters.to_model()
        self._masters.gather(now=True)

    def model_to_masters(self) -> None:
        self._masters.from_model()

    def after_load(self) -> None:
        self._masters.gather(now=True)

    def counters(self) -> dict[str, Any]:
        return dict(self._counters)

    def restore_counters(self, values: Mapping[str, Any]) -> None:
        self._counters = {key: values[key] for key in self._counters}

    def memory_layout(self) -> MemoryLayout:
        has_masters = self._model.transformer.params_dtype is torch.bfloat16
        return MemoryLayout(has_masters=has_masters, num_shares=self._num_shares)

    def _num_shares(self, parameter: Tensor) -> int:
        layout = self._model.layout
        if not self._distributed:
            return 1
        return layout.expert_data if _is_expert(parameter) else layout.replicas

    def dense_traffic(self, *, gathered: float) -> tuple[float, float]:
        trained, dense = Counter[bool](), Counter[bool]()
        for parameter in self._model.parameters():
            trained[_is_expert(parameter)] += parameter.numel() * parameter.requires_grad
        for parameter in trained_when_dense(self._model):
            dense[_is_expert(parameter)] += parameter.numel()
        total_reduced = total_gathered = 0.0
        for chunk in self._chunks:
            held: Any = chunk
            for is_expert, groups in ((False, held.bucket_groups), (True, held.expert_parallel_bucket_groups)):
                # As many times as many parameters would be reduced and gathered.
                factor = dense[is_expert] / max(1, trained[is_expert])
                total_reduced += factor * sum(map(reduced_bytes, groups))
                total_gathered += factor * sum(map(gathered_bytes, groups)) if self._distributed else 0.0
        return total_reduced, total_gathered

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        return Gathering(self._model, self._shapes).weights()

    def load_weights(self, source: WeightSource, *, rebuild_compact: bool) -> None:
        read_weights(self._model, source, self._shapes)
        if rebuild_compact:
            if self._own is not None:
                self._own.rebuild()
            self._masters.from_model()

    def close(self) -> None:
        self._traffic.detach()
        self._offload.close()
        destroy_groups()


def _is_expert(parameter: Tensor) -> bool:
    """Whether Megatron averages its gradient over other process ranks than that of most parameters."""
    return not getattr(parameter, "allreduce", True)
