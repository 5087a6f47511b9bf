"""What all optimizers of this package offer to an engine, its checkpoints and its summary."""

import inspect
import logging
import warnings
import weakref
from abc import ABC
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import wraps
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layers.coverage import Coverage, coverage_of
from .layers.registry import is_target
from .layers.targets import CompactLayer
from .layers.unfit import unfit_layers
from .layers.wrappers import ddp_around
from .options import Options
from .sharding.shards import StatePiece

logger = logging.getLogger("narrowgauge.optimizers")

# A smaller share of the matrices than this is told in a warning.
_LOUD_BELOW = 0.8

OptionsT = TypeVar("OptionsT", bound=Options)
_OptimizerT = TypeVar("_OptimizerT", bound="EngineOptimizer[Any]")
_Keywords = ParamSpec("_Keywords")


class EngineOptimizer(torch.optim.Optimizer, ABC, Generic[OptionsT]):
    """A ``torch.optim.Optimizer`` whose step an engine can finish, and whose state is saved by parameter.

    A class that users make has a constructor ``(self, model, options)`` under :func:`keywords_of`.

    Attributes:
        type_name: what configurations and checkpoints call it.
        options_type: the dataclass of its options.
        options: as it was made with.
        state_version: of :meth:`subspace_state`; another version is not read.
        layers: the converted layers; none if the optimizer works on the model's own parameters.
        coverage: how much of the model's matrices its method trains.
        num_steps: optimizer steps finished.
        in_engine: an engine calls :meth:`after_step`.
    """

    type_name: ClassVar[str]
    options_type: ClassVar[type[Options]]
    state_version: ClassVar[int] = 1
    options: OptionsT
    layers: Sequence[CompactLayer] = ()
    coverage: Coverage
    num_steps: int
    in_engine: bool

    def __init__(self, options: OptionsT, groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
        """As torch's; steps are counted from here on, until an engine does."""
        super().__init__(groups, defaults)
        self.options = options
        self.num_steps, self.in_engine = 0, False
        self._step_hook = self.register_step_post_hook(type(self)._after_own_step)
        self._join_hook = self.register_step_pre_hook(type(self)._refuse_join)
        self._wrappers: list[Any] | None = None

    @classmethod
    def carries_out(cls, options: Any) -> bool:
        """Whether this class does what the options say, and not a subclass of it."""
        return True

    @classmethod
    def class_for(cls: type[_OptimizerT], options: Options) -> type[_OptimizerT]:
        """This class, or the subclass of it that carries the options out.

        Raises:
            ValueError: there is none.
        """
        fitting = (candidate for candidate in (cls, *cls.__subclasses__()) if candidate.carries_out(options))
        if (found := next(fitting, None)) is None:
            raise ValueError(f"{cls.__name__} does not carry out such options: use {cls.type_name}, got {options}")
        return found

    @classmethod
    def unsupported_in_engine(cls, options: Any, *, sharded: bool) -> list[str]:
        """What of the options an engine cannot carry out, ``option: why`` each.

        An engine averages gradients before the optimizer sees them, and saves state by parameter.

        Args:
            sharded: it cuts parameters, gradients and state into flat pieces, as ZeRO does.
        """
        return []

    def _cover(self, model: nn.Module, covered: Collection[str]) -> None:
        """Find how much of the model's matrices are among the layers or parameters ``covered``."""
        linears = {name: module for name, module in model.named_modules() if is_target(module)}
        unfit = unfit_layers(model, {name: m for name, m in linears.items() if name not in covered})
        self.coverage = coverage_of(model, covered, unfit)
        # Made to check options; the optimizer of the model itself tells it.
        self._is_trial = any(p.is_meta for p in model.parameters())

    def _tell_coverage(self, options: Options, what: str) -> None:
        """Say it, on the first process rank; loudly if it is little and nobody has chosen it."""
        if not self._is_trial and (not dist.is_initialized() or dist.get_rank() == 0):
            told = f"{self.type_name}: {self.coverage.describe(what)}"
            logger.info(told)
            if self.coverage.share < _LOUD_BELOW and options.target_modules is None:
                warnings.warn(told, stacklevel=4)

    def _leave_to_engine(self) -> None:
        self._step_hook.remove()
        self._join_hook.remove()
        self.in_engine = True

    def _after_own_step(self, args: Any, kwargs: Any) -> None:
        self.after_step(self.learning_rates())

    def _refuse_join(self, args: Any, kwargs: Any) -> None:
        """Before an own step: ranks that step more often than others would change subspace alone."""
        if getattr(self.options, "refresh_interval", None) is None:
            return
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        if self._wrappers is None:
            self._wrappers = [weakref.ref(found) for found in ddp_around(self.param_groups)]
        if any((wrapper := ref()) is not None and wrapper._join_config.enable for ref in self._wrappers):
            raise RuntimeError(
                f"{type(self).__name__}.step: expected as many steps on every process rank, got"
                " DistributedDataParallel in a Join context, which lets some end earlier: their subspaces would differ."
                " Give every rank the same number of batches (drop_last), and use no Join"
            )

    def learning_rates(self) -> list[float]:
        """The current learning rate of each parameter group."""
        return [group["lr"] for group in self.param_groups]

    def before_step(self) -> None:
        """Before gradients are used: raise if another has changed what this optimizer trains."""

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
        return {"version": self.state_version, "type": self.type_name}

    def _check_subspace_state(self, state: dict[str, Any]) -> None:
        for key, own in self._identity().items():
            if state.get(key) != own:
                raise ValueError(f"{self.type_name} state: expected {key} {own!r}, got {state.get(key)!r}")

    def _subspace_of(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The checked :meth:`subspace_state` in a ``state_dict``.

        Raises:
            ValueError: it is not this optimizer's state.
        """
        if "subspace" not in state_dict:
            raise ValueError(f"not a state of {self.type_name}: it has no 'subspace'")
        self._check_subspace_state(state_dict["subspace"])
        return state_dict["subspace"]


def keywords_of(
    options_type: Callable[_Keywords, OptionsT],
) -> Callable[
    [Callable[[_OptimizerT, nn.Module, OptionsT], None]], Callable[Concatenate[_OptimizerT, nn.Module, _Keywords], None]
]:
    """Let an optimizer's constructor ``(self, model, options)`` take the options' fields as keywords instead.

    ``Grass(model, lr=1e-3)`` is then ``Grass(model, GrassOptions(lr=1e-3))``, to type checkers and editors too. What
    follows ``model`` without a name, options that an engine has read from a file, is passed on as it is. The object
    becomes one of the class that carries the options out (:meth:`EngineOptimizer.class_for`).
    """

    def decorate(
        init: Callable[[_OptimizerT, nn.Module, OptionsT], None],
    ) -> Callable[Concatenate[_OptimizerT, nn.Module, _Keywords], None]:
        @wraps(init)
        def __init__(self: _OptimizerT, model: nn.Module, *given: _Keywords.args, **keywords: _Keywords.kwargs) -> None:
            made: Any = given or (options_type(**keywords),)  # pyright: ignore[reportCallIssue]
            self.__class__ = type(self).class_for(made[0])
            init(self, model, *made)

        self, model, *_ = inspect.signature(init).parameters.values()
        keywords = inspect.signature(options_type).parameters.values()
        made: Any = __init__
        made.__signature__ = inspect.Signature([self, model, *keywords])
        # Documentation would look for the keywords' defaults in the constructor that is wrapped.
        del made.__wrapped__
        return __init__

    return decorate
