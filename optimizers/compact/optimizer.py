"""What the optimizers of compact parameters have in common: base, fold, refresh, state."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..engine_optimizer import EngineOptimizer
from ..layers.targets import CompactLayer, shortened
from ..layers.watch import look_before_step, watch_layers
from ..layers.wrappers import refuse_wrapped
from ..param_groups import build_groups
from ..sharding.shards import LocalShards, StatePiece
from .backend import LocalBackend, SubspaceBackend
from .inner import dense_state, forget_moments_, has_dense_state, make_base, quantize_state_
from .muon import Muon
from .options import CompactOptions
from .trained import trained_matrices

OptionsT = TypeVar("OptionsT", bound=CompactOptions)


@dataclass(frozen=True)
class Converted:
    """What a compact optimizer has made of its targets.

    Attributes:
        layers: converted, with ``compact`` still to be filled.
        full_rank: names of layers that are trained whole, at the matrices' rate.
        dense_rate: names of layers whose compact parameters are trained at the dense parameters' rate.
    """

    layers: list[CompactLayer]
    full_rank: list[str]
    dense_rate: Collection[str] = ()


class CompactOptimizer(EngineOptimizer[OptionsT]):
    """Trains the compact parameters of converted layers, and all others, with a base optimizer.

    Parameter groups and state are shared with the base, so that whoever replaces the groups' parameters (ZeRO does)
    replaces the base's. A subclass converts the layers in :meth:`_convert`, and says in :meth:`_fold` what follows a
    step and in :meth:`_change_subspace` what a refresh does.

    Attributes:
        num_refreshes: changes of subspace so far.
        forget_hooks: called when what was observed of gradients is forgotten.
        base: takes the steps; has the same groups and state.
        folds_to_zero: compact values are changes of the weights, and zero again after each step.
        changes_in_step: subspaces change within a step, and not after it.
    """

    state_version: ClassVar[int] = 2
    folds_to_zero: ClassVar[bool] = False
    changes_in_step: ClassVar[bool] = False

    def __init__(self, model: nn.Module, options: OptionsT, backend: SubspaceBackend | None = None) -> None:
        """
        Args:
            backend: where the tensors live; given by an engine.

        Raises:
            ValueError: the options do not fit the model, which is then as it was, or it is already wrapped.
        """
        refuse_wrapped(model, in_engine=backend is not None)
        converted = self._convert(model, options)
        self.layers = converted.layers
        if not self.layers:
            warnings.warn(
                f"{self.type_name}: no layer is compact, the rank covers all of them; this is plain {options.base}",
                stacklevel=3,
            )
        self.backend: SubspaceBackend = backend or LocalBackend()
        self.num_refreshes, self._is_reverted = 0, False
        # Layers that had no gradient at the last step.
        self._idle: set[str] = set()
        self.forget_hooks: list[Callable[[], None]] = []
        try:
            self._fill_compact()
            groups = build_groups(model, self.layers, converted.full_rank, options, dense_rate=converted.dense_rate)
            local = LocalShards(model)
            self.base = make_base(
                groups,
                options,
                matrices=partial(trained_matrices, model, self.layers, converted.full_rank),
                shards=lambda: self.backend.shards() or local,
            )
            self._check_coverage(model, options, [layer.name for layer in self.layers] + converted.full_rank)
            super().__init__(options, self.base.param_groups, self.base.defaults)
            self._share_with_base()
        except Exception:
            for layer in self.layers:
                layer.module.revert()
            raise
        owner = {id(layer.module.compact): layer.name for layer in self.layers}
        # By position: engines replace the parameters of the groups, and loading a state replaces the groups.
        self._group_of = {owner[id(p)]: i for i, g in enumerate(groups) for p in g["params"] if id(p) in owner}
        self._observe_next_step()
        watch_layers(((layer.name, layer.module) for layer in self.layers), self)

    def _check_coverage(self, model: nn.Module, options: OptionsT, covered: list[str]) -> None:
        self._cover(model, covered)
        if options.target_modules is None and self.coverage.share < options.min_compact_share:
            raise ValueError(
                f"min_compact_share: expected at least {options.min_compact_share}, got {self.coverage.share:.2f}:"
                f" {self.coverage.describe()}. Give a lower share to train these as AdamW does, or name the matrices in"
                " target_modules"
            )
        self._tell_coverage(options, "compact")

    @abstractmethod
    def _convert(self, model: nn.Module, options: OptionsT) -> Converted:
        """Convert the model's layers; before the base class's constructor has done anything.

        Raises:
            ValueError: the options do not fit the model; no layer is converted then.
        """

    @classmethod
    def unsupported_in_engine(cls, options: OptionsT, *, sharded: bool) -> list[str]:
        problems = super().unsupported_in_engine(options, sharded=sharded)
        if options.base == "Adafactor":
            problems.append(
                "base: Adafactor does not work with the engine: it factors matrices, which ZeRO cuts into flat pieces,"
                " and its factors are in no checkpoint; use AdamW8bit, or plain PyTorch and DDP"
            )
        return problems

    def _fill_compact(self) -> None:
        for layer in self.layers:
            with self.backend.gathered(layer), torch.no_grad():
                layer.module.compact.copy_(layer.module.compact_of(layer.module.weight))

    def __getstate__(self) -> dict[str, Any]:
        """Copying and pickling are refused: the copy would keep the original model's layers, or none."""
        raise TypeError(f"{type(self).__name__} holds its model's layers and cannot be copied: use state_dict()")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the added parameters are dense ones."""
        super().add_param_group({"kind": "dense", **param_group})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As the base's; alone and under DDP the weights are folded, and the subspace refreshed when it is due."""
        if self._is_reverted:
            raise RuntimeError(f"{type(self).__name__}.step: its layers were reverted, make another optimizer")
        if not self.in_engine:
            self.before_step()
            self._check_observed()
        loss = self._inner_step(closure)
        owned = self._owned()
        compact = ((layer.name, layer.module.compact) for layer in self.layers)
        self._idle = {name for name, parameter in compact if parameter.grad is None and id(parameter) in owned}
        return loss

    def _owned(self) -> set[int]:
        """The parameters in the groups, by ``id``; under ZeRO they are flat partitions."""
        return {id(p) for group in self.param_groups for p in group["params"]}

    def before_step(self) -> None:
        look_before_step([layer.module for layer in self.layers], self.num_steps)

    def _check_observed(self) -> None:
        """Where the coming change of subspace follows this step's gradients, they have to be finite, or all changes
        after it would not be; the compact ones are equal on all ranks.
        """
        observed = ((layer.name, layer.module) for layer in self.layers if layer.module.probe is not None)
        finite = {name: m.compact.grad.isfinite().all() for name, m in observed if m.compact.grad is not None}
        if finite and not bool(torch.stack(list(finite.values())).all()):
            name = next(name for name, is_finite in finite.items() if not is_finite)
            raise RuntimeError(
                f"{type(self).__name__}.step: expected finite gradients where the next subspaces follow them, got"
                f" others in {name}; nothing has changed: leave such a step out (zero_grad, or torch.amp.GradScaler)"
            )

    def _share_with_base(self) -> None:
        self.base.param_groups, self.base.state = self.param_groups, self.state

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        self._share_with_base()
        return self.base.step(closure)

    def defer_to_engine(self, backend: SubspaceBackend) -> None:
        """Hand fold and refresh to an engine that will call :meth:`after_step` itself, once per optimizer step."""
        self._leave_to_engine()
        self.backend = backend
        if isinstance(self.base, Muon):
            groups = [group for group in self.param_groups if group["kind"] != "dense"]
            self.base.place([flat for group in groups for flat in backend.state_tensors(group)])
        for layer in self.layers:
            if layer.module.watch is not None:
                layer.module.watch.honours_weight = False
        self._note_layers()

    def _note_layers(self) -> None:
        for layer in self.layers:
            layer.module.note()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what was observed of full gradients is forgotten with them, for a step that is not taken."""
        super().zero_grad(set_to_none)
        # An engine does this after the update, before it calls after_step.
        if not self.in_engine:
            self.forget_observed()

    def forget_observed(self) -> None:
        for layer in self.layers:
            layer.module.forget_observed()
        for hook in self.forget_hooks:
            hook()

    def _after_own_step(self, args: Any, kwargs: Any) -> None:
        owned = self._owned()
        if any(id(m.compact) not in owned or m.compact.dim() != 2 for m in (layer.module for layer in self.layers)):
            raise RuntimeError(
                f"another library replaced the parameters of {type(self).__name__} (ZeRO and FSDP do): under ZeRO"
                " let this package's initialize make the engine; FSDP is not supported"
            )
        super()._after_own_step(args, kwargs)

    def after_step(self, learning_rates: Sequence[float]) -> None:
        """Fold the compact values into the weights, count the step, and refresh when it is due."""
        with record_function("narrowgauge::fold"):
            self._fold(learning_rates)
        super().after_step(learning_rates)
        if self.is_refresh_due():
            with record_function("narrowgauge::refresh"):
                self.refresh()
        self._observe_next_step()
        self._note_layers()
        if self.num_steps == 1:
            self._warn_of_unused()

    def _warn_of_unused(self) -> None:
        # Compiled forwards leave no mark; in plain PyTorch a gradient shows that they ran.
        unused = [
            layer.name
            for layer in self.layers
            if not layer.module.was_called and (self.in_engine or layer.name in self._idle)
        ]
        if unused and not (self.in_engine and len(unused) == len(self.layers)):
            warnings.warn(
                f"{self.type_name}: no forward of these compact layers has run by the end of the first step:"
                f" {shortened(unused)}. If the model reads their weight without calling them, or replaced their"
                " forward, they are not trained: leave them out with target_modules",
                stacklevel=3,
            )

    def revert(self) -> None:
        """Make the compact layers ordinary ones again, for training by another optimizer; this one is done then.

        The weights hold all that was trained. Make the other optimizer, and whatever wraps the model, afterwards.

        Raises:
            RuntimeError: an engine trains them, which has the parameters cut and cannot let them go, or another
                optimizer has changed them.
        """
        if self.in_engine:
            raise RuntimeError(
                f"{type(self).__name__}.revert: the layers belong to an engine: save the model's weights and load them"
                " into a new model"
            )
        self.before_step()
        for layer in self.layers:
            if layer.module.watch is not None:
                layer.module.watch.compare(layer.module)
        self._settle()
        for layer in self.layers:
            layer.module.revert()
        self.layers, self._is_reverted = [], True

    def _settle(self) -> None:
        """Bring into the weights what waits for the next change of subspace."""

    def is_refresh_due(self) -> bool:
        """Whether the subspace changes after the step that was just counted."""
        return self._is_multiple_of_interval(self.num_steps)

    def _is_multiple_of_interval(self, step: int) -> bool:
        interval = self.options.refresh_interval
        return interval is not None and bool(self.layers) and step % interval == 0

    @abstractmethod
    def _fold(self, learning_rates: Sequence[float]) -> None:
        """Bring the weights up to date after a step."""

    def _decays(self, learning_rates: Sequence[float]) -> list[float]:
        """By what the step's decay multiplies each layer's weight; 1 for layers that had no gradient.

        Under ZeRO all layers have one: it counts a missing gradient as zero.
        """
        factors = [1.0 - float(lr) * g["weight_decay"] for lr, g in zip(learning_rates, self.param_groups, strict=True)]
        return [1.0 if layer.name in self._idle else factors[self._group_of[layer.name]] for layer in self.layers]

    def refresh(self) -> None:
        """Change the subspace of every layer."""
        self.num_refreshes += 1
        self._change_subspace()

    @abstractmethod
    def _change_subspace(self) -> None:
        """Take new subspaces, and let the compact parameters' moments follow or start again."""

    def _observe_next_step(self) -> None:
        """Begin to observe full gradients if the change of subspace after the coming step needs them."""

    def _reset_moments(self) -> None:
        """Forget m, v and the step count: were the count kept, bias correction would make the next updates too
        large.
        """
        for group in self.param_groups:
            if group["kind"] == "compact":
                for tensor in self.backend.state_tensors(group):
                    forget_moments_(self.base, self.state.get(tensor, {}))

    def state_pieces(self, flat: Tensor) -> Iterable[StatePiece]:
        return self.base.neuron_pieces(flat) if isinstance(self.base, Muon) else ()

    def dense_state(self, flat: Tensor) -> dict[str, Any]:
        """As in every optimizer; 8-bit moments in fp32."""
        return dense_state(self.state.get(flat, {}))

    def expect_dense_state(self, flat: Tensor) -> None:
        if not has_dense_state(self.base):
            # If moments had just been forgotten when it was saved, there are none to read.
            self.state.pop(flat, None)

    def accept_dense_state(self, flat: Tensor) -> None:
        """Bring what was read into ``state[flat]`` into the base's form.

        8-bit moments are quantised anew: those of a resumed run differ from the saved ones by the rounding that every
        step does anyway. ``state_dict`` keeps them bit for bit.
        """
        if not has_dense_state(self.base):
            quantize_state_(self.base, self.state[flat])

    def subspace_bytes(self) -> int:
        """Bytes of what describes the subspaces, indices or bases, which is whole on every process rank."""
        return sum(value.nbytes for layer in self.layers for value in layer.module.subspace().values())

    def subspace_state(self) -> dict[str, Any]:
        return {
            **super().subspace_state(),
            "num_refreshes": self.num_refreshes,
            "tensors": {
                f"{layer.name}.{key}": value.cpu()
                for layer in self.layers
                for key, value in layer.module.subspace().items()
            },
        }

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        super().load_subspace_state(state)
        for layer in self.layers:
            keys = layer.module.subspace()
            layer.module.set_subspace({key: state["tensors"][f"{layer.name}.{key}"] for key in keys})
            if layer.module.watch is not None:
                # Values are loaded by whoever holds them.
                layer.module.watch.suspend()
        self.num_refreshes = state["num_refreshes"]

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "base": self.options.base}

    def _check_subspace_state(self, state: dict[str, Any]) -> None:
        super()._check_subspace_state(state)
        name = self.type_name
        saved: dict[str, Tensor] = state["tensors"]
        own = {f"{layer.name}.{key}": value for layer in self.layers for key, value in layer.module.subspace().items()}
        if set(saved) != set(own):
            odd = sorted(set(saved) ^ set(own))
            raise ValueError(f"{name} state: its compact layers differ from this model's, for example {odd[:4]}")
        for key, value in own.items():
            if saved[key].shape != value.shape:
                raise ValueError(
                    f"{name} state: expected {key} of shape {list(value.shape)}, got {list(saved[key].shape)}"
                )

    def state_dict(self) -> dict[str, Any]:
        """The base's state and, under ``subspace``, the subspaces, counters and compact values."""
        compact = {layer.name: layer.module.compact.detach() for layer in self.layers}
        return {**super().state_dict(), "subspace": {**self.subspace_state(), "compact": compact}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict`, in either order with the model's; the weights are folded afterwards.

        Raises:
            ValueError: it is not this optimizer's state, or belongs to another configuration; nothing has changed then.
        """
        subspace = self._subspace_of(state_dict)
        self._share_with_base()
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "subspace"})
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self.load_subspace_state(subspace)
        for layer in self.layers:
            layer.module.compact.copy_(subspace["compact"][layer.name])
        if any(not layer.module.is_delta for layer in self.layers):
            self.backend.fold(self.layers)
        self._note_layers()
