"""DeepSpeed's engine as :class:`narrowgauge.engine.protocol.TrainingEngine`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from narrowgauge.offload import ActivationOffload
from narrowgauge.optimizers import EngineOptimizer
from narrowgauge.optimizers.layers.plain import plain_parameters
from narrowgauge.optimizers.layers.shape import whole_shape
from narrowgauge.optimizers.sharding.shards import Shard

from ...checkpoint import weights
from ...micro_batch import Batch, micro_batch_of
from ...protocol import MemoryLayout, ParallelGroup, Phase, WeightSource
from ...report.dense_traffic import dense_traffic, dense_traffic_zero3, trained_when_dense
from ...report.parameters import count_parameters
from .privates import autocast_scaler, gather_again, groups_of, is_persistent, is_sharded, own_shard
from .shards import local_shards, masters_to_model
from .traffic import TrafficCounter

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class DeepSpeedTraining:
    """A ``DeepSpeedEngine``, with one of our optimizers or any other, as the training loop and checkpoints use it."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._deepspeed: Any = engine
        self._traffic = TrafficCounter()

    @property
    def engine(self) -> Any:
        """DeepSpeed's."""
        return self._deepspeed

    @property
    def module(self) -> nn.Module:
        return self._deepspeed.module

    @property
    def device(self) -> torch.device:
        return torch.device(self._deepspeed.device)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._deepspeed.basic_optimizer

    @property
    def own_optimizer(self) -> EngineOptimizer | None:
        return getattr(self._deepspeed, "own_optimizer", None)

    @property
    def lr_scheduler(self) -> Any:
        return self._deepspeed.lr_scheduler

    @property
    def data_parallel(self) -> ParallelGroup:
        group = self._deepspeed.data_parallel_group
        return ParallelGroup(comm.get_rank(group), self._deepspeed.dp_world_size, group)

    @property
    def accumulation_steps(self) -> int:
        return self._deepspeed.gradient_accumulation_steps()

    @property
    def activation_offload(self) -> ActivationOffload | None:
        return getattr(self._deepspeed, "activation_offload", None)

    @property
    def traffic(self) -> TrafficCounter:
        return self._traffic

    @property
    def description(self) -> str:
        return f"ZeRO-{self.zero_stage}"

    @property
    def zero_stage(self) -> int:
        return int(self._deepspeed.zero_optimization_stage())

    @property
    def forward_is_collective(self) -> bool:
        return self.zero_stage == 3

    @property
    def state_is_replicated(self) -> bool:
        return self.zero_stage == 0

    def train_step(self, batches: Iterator[Batch], phase: Phase) -> Tensor:
        engine = self._deepspeed
        loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
        for _ in range(self.accumulation_steps):
            batch = micro_batch_of(next(batches)).to(engine.device)
            with phase("forward"):
                loss = engine(**batch.inputs()).loss * batch.weight
            with phase("backward"):
                engine.backward(loss)
            with phase("optimizer"):
                engine.step()
            loss_sum += loss.detach()
        return loss_sum

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        engine = self._deepspeed
        engine.eval()
        loss = engine(**micro_batch_of(batch).to(engine.device).inputs()).loss
        engine.train()
        return loss

    def step_metrics(self) -> Mapping[str, Any]:
        return {}

    def generate(self, tokens: Tensor, *, before_forward: Callable[[], None], **options: Any) -> Tensor:
        model: Any = self.module
        with model.register_forward_pre_hook(lambda *_: before_forward(), prepend=True):
            return model.generate(tokens, **options)

    def grad_norm(self) -> float | None:
        norm = self._deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else None

    def shards(self) -> Sequence[Shard]:
        return local_shards(self._deepspeed)

    def saves(self, shard: Shard) -> bool:
        return True

    def trainable_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self.shape_of(p) for name, p in self.module.named_parameters() if p.requires_grad}

    def subspace_state(self) -> dict[str, Any] | None:
        return self.own_optimizer.subspace_state() if self.own_optimizer is not None else None

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        assert self.own_optimizer is not None
        self.own_optimizer.load_subspace_state(state)

    def parameter_counts(self) -> dict[str, int]:
        return count_parameters(self.module, self.shape_of)

    def parameter_groups(self) -> Mapping[str, int]:
        groups = groups_of(self._deepspeed.optimizer)
        return {self._deepspeed.param_names[p]: number for number, group in enumerate(groups) for p in group}

    def shape_of(self, parameter: Tensor) -> tuple[int, ...]:
        return whole_shape(parameter)

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        return deepspeed.zero.GatheredParameters(list(parameters))

    def local_part(self, parameter: Tensor) -> tuple[Tensor, int]:
        return own_shard(parameter) if is_sharded(parameter) else (parameter.detach(), 0)

    def before_save(self) -> None:
        if hasattr(self._deepspeed, "write_back"):
            self._deepspeed.write_back()

    def masters_to_model(self) -> None:
        masters_to_model(self._deepspeed)

    def model_to_masters(self) -> None:
        if hasattr(self._deepspeed.optimizer, "refresh_fp32_params"):
            self._deepspeed.optimizer.refresh_fp32_params()

    def after_load(self) -> None:
        gather_again(list(self.module.parameters()))

    def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = {key: getattr(self._deepspeed, key) for key in _COUNTERS}
        if self._deepspeed.fp16_enabled():
            scaler = vars(self._deepspeed.optimizer.loss_scaler)
            counters["loss_scaler"] = {k: v for k, v in scaler.items() if isinstance(v, int | float)}
        if (autocast := autocast_scaler(self._deepspeed)) is not None:
            counters["autocast_scaler"] = autocast.state_dict()
        return counters | {name: places.state_dict() for name, places in self._places_in_data()}

    def _places_in_data(self) -> Iterator[tuple[str, Any]]:
        """What of DeepSpeed's ``data_efficiency`` goes on from step to step."""
        engine = self._deepspeed
        if engine.training_dataloader is not None and engine.curriculum_learning_enabled():
            yield "data_sampler", engine.training_dataloader.data_sampler
        if engine.random_ltd_enabled() and engine.random_ltd_scheduler is not None:
            yield "random_ltd", engine.random_ltd_scheduler

    def restore_counters(self, values: Mapping[str, Any]) -> None:
        engine = self._deepspeed
        for key in _COUNTERS:
            setattr(engine, key, values[key])
        for name, places in self._places_in_data():
            if name in values:
                places.load_state_dict(values[name])
        if (autocast := autocast_scaler(engine)) is not None and "autocast_scaler" in values:
            autocast.load_state_dict(dict(values["autocast_scaler"]))
        # Where the next step ends is counted from here, and the number of micro-batches in a step may have changed.
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        if engine.fp16_enabled():
            vars(engine.optimizer.loss_scaler).update(values.get("loss_scaler", {}))

    def memory_layout(self) -> MemoryLayout:
        engine, stage = self._deepspeed, self.zero_stage
        # ZeRO-3 in fp32 without offload steps its shards themselves.
        has_masters = stage > 0 and (
            stage < 3 or engine.bfloat16_enabled() or engine.fp16_enabled() or bool(engine.optimizer.offload_optimizer)
        )
        num_shares = engine.dp_world_size if stage else 1
        return MemoryLayout(has_masters=has_masters, num_shares=lambda parameter: num_shares)

    def dense_traffic(self, *, gathered: float) -> tuple[float, float]:
        size, steps = self._deepspeed.dp_world_size, self.accumulation_steps
        parameters = trained_when_dense(self.module)
        element = torch.finfo(parameters[0].dtype).bits // 8
        trainable = element * sum(map(self._numel, parameters))
        reduced_as = torch.finfo(self._deepspeed.communication_data_type).bits // 8 / element
        if self.zero_stage < 3:
            reduced, dense_gathered = dense_traffic(
                stage=self.zero_stage, parameter_bytes=trainable, world_size=size, accumulation_steps=steps
            )
        else:
            plain = [p for _, p in plain_parameters(self.module)]
            reduced, dense_gathered = dense_traffic_zero3(
                gathered=gathered,
                current=[(element * self._numel(p), is_persistent(p)) for p in self.module.parameters()],
                dense=[(element * self._numel(p), is_persistent(p)) for p in plain],
                trainable_bytes=trainable,
                world_size=size,
                accumulation_steps=steps,
            )
        return reduced * reduced_as, dense_gathered

    def _numel(self, parameter: Tensor) -> int:
        return math.prod(self.shape_of(parameter))

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        return weights.whole_weights(self)

    def load_weights(self, source: WeightSource, *, rebuild_compact: bool) -> None:
        weights.load_weights(self, source, rebuild_compact=rebuild_compact)

    def close(self) -> None:
        self._traffic.detach()
        if self.activation_offload is not None:
            self.activation_offload.close()
