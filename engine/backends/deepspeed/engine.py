"""DeepSpeed's engine with one of our optimizers: what it does once per step, and its checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from narrowgauge.optimizers import CompactOptimizer, EngineOptimizer, ShardedOptimizer
from narrowgauge.optimizers.compact.backend import LocalBackend, SubspaceBackend

from ...checkpoint.checkpoint import load_checkpoint, save_checkpoint
from ...files import write_text
from ...lora.adapters import is_adapted
from ...ranks.together import together
from .privates import ConsolidationHook
from .shards import EngineShards
from .subspace import PartitionedStateBackend, PartitionedWeightBackend
from .training import DeepSpeedTraining


class _Weights:
    """A ``state_dict`` as a :class:`~narrowgauge.engine.protocol.WeightSource`."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._state[name].shape) if name in self._state else None

    def read(self, name: str) -> torch.Tensor:
        return self._state[name].detach()


class Engine(ConsolidationHook):
    """A ``DeepSpeedEngine`` whose client optimizer is one of ours; used like the original.

    DeepSpeed replaces the optimizer's parameters by flat shards and calls its ``step`` once per group or sub-group,
    before the model's weights are updated. So the optimizer only updates there; fold, count and refresh follow here,
    once per applied step.
    """

    own_optimizer: EngineOptimizer
    module: torch.nn.Module

    def __init__(self, *, optimizer: EngineOptimizer, **kwargs: Any) -> None:
        self.__dict__["own_optimizer"] = optimizer
        super().__init__(optimizer=optimizer, **kwargs)
        if isinstance(optimizer, CompactOptimizer):
            optimizer.defer_to_engine(self._make_backend(optimizer))
        elif isinstance(optimizer, ShardedOptimizer):
            optimizer.defer_to_engine(EngineShards(self) if self.zero_optimization_stage() else None)

    def _make_backend(self, optimizer: CompactOptimizer) -> SubspaceBackend:
        stage = self.zero_optimization_stage()
        if stage == 0:
            return LocalBackend()
        if stage == 3:
            return PartitionedWeightBackend(self.optimizer, optimizer.layers, lambda: EngineShards(self))
        return PartitionedStateBackend(self.optimizer, lambda: EngineShards(self))

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        own, num_skipped = self.own_optimizer, self.skipped_steps
        learning_rates = own.learning_rates()
        if self.is_gradient_accumulation_boundary():
            own.before_step()
        super().step(lr_kwargs)
        if self.was_step_applied():
            own.after_step(learning_rates)
        elif self.skipped_steps > num_skipped:
            own.forget_observed()

    def write_back(self) -> None:
        """Bring the weights of all ranks up to date; under ZeRO-3 their shards lag behind between changes of
        subspace.
        """
        own = self.own_optimizer
        if isinstance(own, CompactOptimizer) and isinstance(own.backend, PartitionedWeightBackend):
            own.backend.write_back(own.layers)

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Literal[True]:
        """Write ``save_dir/tag`` (see :mod:`.checkpoint`); collective, called like DeepSpeed's.

        Args:
            client_state: JSON values.
            exclude_frozen_parameters: of a model with adapters, whose frozen base is left out always.

        Raises:
            CheckpointError: a rank could not write.
            ValueError: ``exclude_frozen_parameters`` without adapters: the frozen weights are the model.
        """
        if exclude_frozen_parameters and not is_adapted(self.module):
            raise ValueError("exclude_frozen_parameters: the frozen weights hold what was trained; they are needed")
        tag = tag if tag is not None else f"global_step{self.global_steps}"
        save_checkpoint(DeepSpeedTraining(self), Path(save_dir) / tag, client_state or {})
        if save_latest:
            together("save", lambda: self._write_latest(Path(save_dir), tag))
        return True

    def _write_latest(self, save_dir: Path, tag: str) -> None:
        if self.global_rank == 0:
            write_text(save_dir / "latest", tag)

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Restore what :meth:`save_checkpoint` wrote, with any number of ranks; called like DeepSpeed's.

        Args:
            load_module_strict: False is for adapters, whose base is not in the checkpoint.

        Returns:
            The checkpoint's folder and its ``client_state``; ``(None, None)`` if no tag is given and there is no
            ``latest``.

        Raises:
            CheckpointError: it is damaged, or belongs to another model.
        """
        if custom_load_fn is not None or not (load_module_strict or is_adapted(self.module)):
            raise ValueError("load_module_strict=False and custom_load_fn are not supported with our optimizers")
        latest = Path(load_dir) / "latest"
        if tag is None and not latest.is_file():
            return None, None
        folder = Path(load_dir) / (tag if tag is not None else latest.read_text().strip())
        client_state = load_checkpoint(
            DeepSpeedTraining(self),
            folder,
            optimizer_states=load_optimizer_states and not load_module_only,
            scheduler_state=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
        )
        return str(folder), client_state

    def load_module_state_dict(
        self,
        checkpoint: Mapping[str, Any],
        strict: bool = True,
        custom_load_fn: Any = None,
        fetch_z3_params: bool = False,
        z3_params_to_fetch: Any = None,
        allowed_missing_keys: Any = None,
    ) -> None:
        """Take the weights ``checkpoint["module"]``, whole on every rank; compact values and masters follow, and
        moments stay. Called like DeepSpeed's, at every stage.

        Raises:
            ValueError: a weight is missing, has another shape or belongs to no parameter; nothing has changed then.
        """
        if not strict or custom_load_fn is not None:
            raise ValueError("strict=False and custom_load_fn are not supported with our optimizers")
        state: Mapping[str, torch.Tensor] = checkpoint["module"]
        unknown = sorted(state.keys() - self.module.state_dict(keep_vars=True).keys())
        if unknown:
            raise ValueError(f"{unknown[0]}: expected a weight of the model ({len(unknown)} are none)")
        training = DeepSpeedTraining(self)
        training.load_weights(_Weights(state), rebuild_compact=True)
        training.after_load()

    def before_consolidation(self) -> None:
        self.write_back()

    def after_consolidation(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        compact = {layer.compact_name for layer in self.own_optimizer.layers}
        return {k: v for k, v in state.items() if k not in compact}
