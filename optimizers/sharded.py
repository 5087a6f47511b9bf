"""What the optimizers on full gradients have in common: groups, shards, counting, state."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .engine_optimizer import EngineOptimizer, OptionsT
from .layers.experts import StackedMatrices
from .layers.find_experts import find_experts
from .layers.targets import find_targets
from .members import Member, members_of
from .param_groups import build_groups
from .sharding.shards import LocalShards, ShardMap
from .sharding.stacked import StackedShards


class ShardedOptimizer(EngineOptimizer[OptionsT]):
    """An optimizer on the whole averaged gradient that works on shards of parameters.

    Where experts' matrices are stacked in one parameter, every matrix is a member of its own, with its own subspace,
    norm and state. In plain PyTorch, under DDP and at ZeRO stage 0 a shard is a whole member. ZeRO replaces the
    parameters of the groups by flat partitions and calls ``step`` once per group or sub-group; an engine then gives a
    :class:`~.shards.ShardMap` through :meth:`defer_to_engine` and calls :meth:`after_step` itself.

    A subclass implements :meth:`_update`, and :meth:`state_pieces` if it has state that is not shaped like the
    parameters. Groups have a ``kind``: ``matrix`` for the weights of ``target_modules``, ``dense`` for the others.

    Attributes:
        needs_matrices: ``target_modules`` must match something.
        group_defaults: the options that are also entries of the parameter groups.
        saves_traffic: less than the whole gradient is reduced.
        members: what is trained by one rule each, by name.
        targets: names of the members that ``target_modules`` names.
        shards: how the members are cut.
    """

    needs_matrices: ClassVar[bool] = True
    saves_traffic: bool = False

    group_defaults: ClassVar[tuple[str, ...]] = ("lr", "betas", "eps", "weight_decay")

    def __init__(self, model: nn.Module, options: OptionsT) -> None:
        """
        Raises:
            ValueError: globs that match nothing, or parameters sharded by FSDP2.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"expected the model itself, not its parameters, got a {type(model).__name__}")
        # By name: the import takes as long as half of torch.
        if any(type(p).__name__ == "DTensor" for p in model.parameters()):
            raise ValueError(
                f"{type(self).__name__}: the model's parameters are sharded by fully_shard, which is not supported; use"
                " DistributedDataParallel, or ZeRO through an engine"
            )
        experts = find_experts(model)
        found: dict[str, nn.Linear | StackedMatrices] = {}
        try:
            found = find_targets(model, options.target_modules, experts)
        except ValueError:
            if self.needs_matrices or options.target_modules is not None or options.matrix_lr_scale != 1.0:
                raise
        self.members: dict[str, Member] = members_of(model, found, experts)
        self.targets = [name for name, member in self.members.items() if member.is_target]
        groups = build_groups(model, [], list(found), options)
        # Without matrices, all parameters are trained by one rule.
        self._cover(model, found or [name for name, _ in model.named_parameters()])
        self._tell_coverage(options, "matrices to it")
        super().__init__(options, groups, {key: getattr(options, key) for key in self.group_defaults})
        self._stacks = frozenset(experts)
        self.shards: ShardMap = StackedShards(LocalShards(model), self._stacks)
        self._warned = False
        self._warn_of_traffic()

    def defer_to_engine(self, shards: ShardMap | None) -> None:
        """Work on these shards, for an engine that will call :meth:`after_step` itself, once per optimizer step.

        Args:
            shards: how the parameters are cut; None where they stay whole.
        """
        self._leave_to_engine()
        if shards is not None:
            self.shards = StackedShards(shards, self._stacks)
        self._warn_of_traffic()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, while the optimizer is made.

        Raises:
            ValueError: afterwards: parameters go by their names in the model.
        """
        if "kind" not in param_group:
            raise ValueError(f"{type(self).__name__}: groups are made with the optimizer; give it param_groups")
        super().add_param_group(param_group)

    def _warn_of_traffic(self) -> None:
        if self.saves_traffic or self._warned or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        self._warned = True
        if dist.get_rank() == 0:
            warnings.warn(
                f"{type(self).__name__} needs the whole averaged gradient: it does not shrink the traffic between"
                " process ranks, as Grass and GaLore do",
                stacklevel=3,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters of all groups; under ZeRO, of those that the engine has put into the groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            flats = [p for p in group["params"] if p.grad is not None]
            if flats:
                self._update(group, flats)
        return loss

    @abstractmethod
    def _update(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        """One step of the parameters or flat partitions ``flats`` of ``group``, all with gradients.

        Collective if it sums over ``self.shards``: every rank comes here for the same groups in the same order.
        """

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and the counters under ``subspace``."""
        return {**super().state_dict(), "subspace": self.subspace_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict`.

        Raises:
            ValueError: it is not this optimizer's state; nothing has changed then.
        """
        subspace = self._subspace_of(state_dict)
        saved, own = ([len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], self.param_groups))
        if saved != own:
            raise ValueError(
                f"{self.type_name} state: expected parameter groups of {own} parameters, got groups of {saved}"
            )
        self.load_subspace_state(subspace)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "subspace"})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, flat in zip(numbers, (p for group in self.param_groups for p in group["params"]), strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if torch.is_tensor(value) and value.dtype != self.state[flat][key].dtype:
                    # torch has rounded the state to the parameter's dtype; ours is wider than bf16 parameters.
                    self.state[flat][key] = value.to(flat.device, copy=True)
