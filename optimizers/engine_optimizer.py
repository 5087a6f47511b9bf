"""What all optimizers of this package offer to an engine, its checkpoints and its summary."""

from abc import ABC
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .layers.targets import CompactLayer
from .sharding.shards import StatePiece


class EngineOptimizer(torch.optim.Optimizer, ABC):
    """A ``torch.optim.Optimizer`` whose step an engine can finish, and whose state is saved by parameter.

    Attributes:
        state_version: of :meth:`subspace_state`; another version is not read.
        layers: the converted layers; none if the optimizer works on the model's own parameters.
        num_steps: optimizer steps finished.
        in_engine: an engine calls :meth:`after_step`.
    """

    state_version: ClassVar[int] = 1
    layers: Sequence[CompactLayer] = ()
    num_steps: int
    in_engine: bool

    def __init__(self, groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
        """As torch's; steps are counted from here on, until an engine does."""
        super().__init__(groups, defaults)
        self.num_steps, self.in_engine = 0, False
        self._step_hook = self.register_step_post_hook(type(self)._after_own_step)

    @staticmethod
    def check_options(**options: Any) -> None:
        """Check the constructor's options that need no model.

        Raises:
            ValueError: ``option: what was found, what is needed``.
        """

    def _leave_to_engine(self) -> None:
        self._step_hook.remove()
        self.in_engine = True

    def _after_own_step(self, args: Any, kwargs: Any) -> None:
        self.after_step(self.learning_rates())

    def learning_rates(self) -> list[float]:
        """The current learning rate of each parameter group."""
        return [group["lr"] for group in self.param_groups]

    def after_step(self, learning_rates: Sequence[float]) -> None:
        """Finish a step.

        Args:
            learning_rates: those the step was taken with (a scheduler may have moved on since).
        """
        self.num_steps += 1

    def forget_observed(self) -> None:
        """Forget what was observed of gradients since the last step: it was skipped, they may not be finite."""

    def state_pieces(self, flat: Tensor) -> Iterable[StatePiece]:
        """The state of ``flat`` that is not shaped like it, allocated if there is none yet: for checkpoints."""
        return ()

    def dense_state(self, flat: Tensor) -> dict[str, Any]:
        """The other state of ``flat`` as numbers and tensors shaped like it: for checkpoints."""
        return self.state.get(flat, {})

    def expect_dense_state(self, flat: Tensor) -> None:
        """Before a saved :meth:`dense_state` is read into ``state[flat]``."""

    def accept_dense_state(self, flat: Tensor) -> None:
        """After a saved :meth:`dense_state` was read into ``state[flat]``."""

    def subspace_bytes(self) -> int:
        """Bytes of what describes the subspaces and is whole on every process rank."""
        return 0

    def subspace_state(self) -> dict[str, Any]:
        """JSON values, and under ``tensors``, where there are any, what describes the subspaces; with the parameters,
        states and groups, all that a resume needs.
        """
        return {**self._identity(), "num_steps": self.num_steps}

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`subspace_state`; compact values are the caller's to restore.

        Raises:
            ValueError: it was saved by another version, type or configuration; nothing has changed then.
        """
        self._check_subspace_state(state)
        self.num_steps = state["num_steps"]

    def _identity(self) -> dict[str, Any]:
        """What a state that is loaded must agree in."""
        return {"version": self.state_version, "type": type(self).__name__}

    def _check_subspace_state(self, state: dict[str, Any]) -> None:
        for key, own in self._identity().items():
            if state.get(key) != own:
                raise ValueError(f"{type(self).__name__} state: {key} {state.get(key)!r} found, {own!r} expected")

    def _subspace_of(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The checked :meth:`subspace_state` in a ``state_dict``.

        Raises:
            ValueError: it is not this optimizer's state.
        """
        if "subspace" not in state_dict:
            raise ValueError(f"not a state of {type(self).__name__}: it has no 'subspace'")
        self._check_subspace_state(state_dict["subspace"])
        return state_dict["subspace"]
