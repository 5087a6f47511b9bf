"""A tensor-parallel model under DeepSpeed's ZeRO as :class:`narrowgauge.engine.protocol.TrainingEngine`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....config.config import Batches
from ....micro_batch import Batch
from ....protocol import MemoryLayout, Phase, WeightSource
from ...deepspeed.model_parallel import take_values, whole
from ...deepspeed.privates import forget_model, forget_model_parallel
from ...deepspeed.training import DeepSpeedTraining
from ..micro_batches import given_of
from ..model import StagedModel
from ..offload import ScheduledOffload
from ..training import MegatronTraining
from ..whole import Gathering, check_shapes, fill_from
from .backend import ZeroCompactPart
from .masters import ZeroMasters


class ZeroTraining(MegatronTraining):
    """One chunk of a model, trained by DeepSpeed's engine: each micro-batch by itself, without a schedule.

    Args:
        zero: DeepSpeed's engine of the chunk.
        masters: bound to it.
        shapes, batches, offload: as of :class:`MegatronTraining`; so is ``compact``, as ``own``.
    """

    def __init__(
        self,
        model: StagedModel,
        zero: DeepSpeedTraining,
        masters: ZeroMasters,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        batches: Batches,
        offload: ScheduledOffload,
        compact: ZeroCompactPart | None,
    ) -> None:
        self._zero = zero
        held: Any = masters  # what else Megatron's do is DeepSpeed's here
        super().__init__(
            model,
            (),
            held,
            zero.optimizer,
            shapes=shapes,
            lr_scheduler=zero.lr_scheduler,
            batches=batches,
            gradient_clipping=0.0,
            distributed=True,
            offload=offload,
            own=compact,
        )
        self._shards = [_in_flat(shard, masters) for shard in self._shards]

    @property
    def traffic(self) -> Any:
        return self._zero.traffic

    @property
    def description(self) -> str:
        return f"{super().description} {self._zero.description}"

    @property
    def zero_stage(self) -> int:
        return self._zero.zero_stage

    def train_step(self, batches: Iterator[Batch], phase: Phase) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self._offload.begin_step()
        for number in range(self.accumulation_steps):
            (given,) = given_of([next(batches)], self._model.layout, self._model.place, self._device)
            with phase("forward"), self._offload.forward(number, 0):
                loss = given.loss(self._zero.engine(**given.inputs()))
            with phase("backward"):
                self._zero.engine.backward(loss)
            with phase("optimizer"):
                self._step(is_last=number + 1 == self.accumulation_steps)
            loss_sum += loss.detach()
        return loss_sum

    def _step(self, *, is_last: bool) -> None:
        """After a micro-batch: the weights change after the last."""
        engine, compact = self._zero.engine, self._own if is_last else None
        num_skipped = engine.skipped_steps
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if compact is not None:
            compact.before_step()
        engine.step()
        if compact is None:
            return
        if engine.was_step_applied():
            compact.own.after_step(rates)
        elif engine.skipped_steps > num_skipped:
            compact.own.forget_observed()

    def grad_norm(self) -> float | None:
        return self._zero.grad_norm()

    def shape_of(self, parameter: Tensor) -> tuple[int, ...]:
        return self._zero.shape_of(parameter)

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        return whole(parameters) if self.zero_stage == 3 else nullcontext()

    def local_part(self, parameter: Tensor) -> tuple[Tensor, int]:
        return self._zero.local_part(parameter)

    def before_save(self) -> None:
        if self._own is not None:
            self._own.before_save()

    def masters_to_model(self) -> None:
        self._zero.masters_to_model()

    def model_to_masters(self) -> None:
        self._zero.model_to_masters()

    def after_load(self) -> None:
        self._zero.after_load()

    def counters(self) -> dict[str, Any]:
        return self._zero.counters()

    def restore_counters(self, values: Mapping[str, Any]) -> None:
        self._zero.restore_counters(values)

    def memory_layout(self) -> MemoryLayout:
        return self._zero.memory_layout()

    def dense_traffic(self, *, gathered: float) -> tuple[float, float]:
        return self._zero.dense_traffic(gathered=gathered)

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        return Gathering(self._model, self._shapes, gathered=self.gathered).weights()

    @torch.no_grad()
    def load_weights(self, source: WeightSource, *, rebuild_compact: bool) -> None:
        if self.zero_stage < 3:
            super().load_weights(source, rebuild_compact=False)
        else:
            check_shapes(source, self._shapes)
            for held, parameter in self._model.local_parameters():
                values = torch.zeros(held.shape, dtype=parameter.dtype, device=parameter.device)
                fill_from(source, [(held, values)])
                take_values(parameter, values)
        if rebuild_compact:
            self._zero.after_load()
            if self._own is not None:
                self._own.rebuild()
            self._zero.model_to_masters()

    def close(self) -> None:
        self._zero.traffic.detach()
        # Its hooks hold the model, and with it process groups and their threads.
        self._zero.engine.destroy()
        forget_model_parallel()
        forget_model(self._zero.engine.module)
        super().close()


def _in_flat(shard: Any, masters: ZeroMasters) -> Any:
    """A shard of a master that is a piece of a flat tensor, as one of that."""
    flat, offset = masters.flats[id(shard.flat)]
    return replace(shard, flat=flat, offset=offset + shard.offset)
