"""Notices that a compact layer is changed behind its optimizer's back: its training would be lost without a word."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from .unit import CompactUnit

_watched: "weakref.WeakSet[CompactUnit]" = weakref.WeakSet()
_owners: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()

# Forwards since the last known change after which the tensors are compared without a reason; doubles every time.
_FIRST_COMPARISON = 64
# Of the rows of a compact parameter so many in one are compared before a step, and so many at least.
_ROWS_PER_COMPARED, _LEAST_ROWS = 16, 16

# What is known where compact is not what the layer's weight holds.
_LOST = "others, which never reach the layer's weight"
_WRITTEN = f"{_LOST}: something has written to compact, as another optimizer does that trains it"
_MOVED = (
    f"{_LOST}: they lie in other memory now, as after torch.nn.utils.vector_to_parameters (load_state_dict and copy_"
    " leave them where they are), or where FSDP or another engine has cut them"
)
_ANOTHER = "another optimizer that would change them"


class Watch:
    """Compares a layer's ``compact`` with its ``weight`` whenever something else may have written to one of them.

    What was written is seen by the tensors' version counters, at the cost of two comparisons of numbers per forward.
    They do not count what is written through ``.data``, by fused kernels or into the flat buffers of another engine:
    for these a part of the tensors is compared before every step of the optimizer, and all of them at every forward
    once their memory has moved, and now and then if it has not.

    Args:
        name: of the layer.
        owner_type: of the optimizer that trains ``compact``.
        owner: that optimizer, while it is there.
    """

    def __init__(self, name: str, owner_type: str, owner: Callable[[], torch.optim.Optimizer | None]) -> None:
        self._name, self._owner_type, self._owner = name, owner_type, owner
        self.is_on, self.honours_weight = True, True
        self._noted: tuple[Any, ...] = ()
        self._moved = False
        self._uses, self._next = 0, _FIRST_COMPARISON

    def __deepcopy__(self, memo: Any) -> "Watch":
        return _WatchOfCopy(self._name, self._owner_type, _nobody)

    def __reduce__(self) -> Any:
        return _WatchOfCopy, (self._name, self._owner_type, _nobody)

    def note(self, layer: "CompactUnit") -> None:
        """The layer is as its optimizer, or a load, has left it."""
        self._noted, self._moved = _state_of(layer), False
        self._uses, self._next = 0, _FIRST_COMPARISON

    def suspend(self) -> None:
        """Until :meth:`note`: the layer is being loaded, one part after the other."""
        self._noted = ()

    def look(self, layer: "CompactUnit") -> None:
        """Before the layer is used.

        Raises:
            RuntimeError: ``compact`` holds what nothing will bring into the weight.
        """
        if not layer.holds_weight():
            raise RuntimeError(
                f"{self._name}.weight: expected the parameter that {self._owner_type} was made with, got a tensor that"
                " is computed for each forward, as by pruning, a parametrization or FSDP: training would not reach it."
                " Add such things before the optimizer is made, and leave the layer out with target_modules"
            )
        if not self.is_on or not self._noted:
            return
        self._uses += 1
        if self._moved or self._uses >= self._next or _state_of(layer) != self._noted:
            self.compare(layer)

    def is_unchanged(self, layer: "CompactUnit") -> bool:
        """Whether nothing is known to have been written since :meth:`note`."""
        return not self._moved and _state_of(layer) == self._noted

    def compare(self, layer: "CompactUnit") -> None:
        """As :meth:`look`, of the tensors themselves; edits of the weight are taken over."""
        if not self.is_on or not self._noted:
            return
        found = _state_of(layer)
        if self._is_taken(layer):
            raise RuntimeError(self._changed(_MOVED))
        if not layer.is_whole():
            # Cut in pieces: by our engine, or by one that the optimizer's step refuses.
            return
        if not layer.agrees():
            # Averaged weights that are swapped in are written to both; other optimizers write to compact alone.
            is_edited = found[3] != self._noted[3]
            if not is_edited:
                if self._moved or found[2] != self._noted[2]:
                    raise RuntimeError(self._changed(_MOVED))
                raise RuntimeError(self._changed(_WRITTEN) if found != self._noted else self._unseen())
            if not self.honours_weight:
                raise RuntimeError(
                    f"{self._name}.weight: expected no edit while an engine trains it, whose masters do not know of it,"
                    " got one: edit weights before the engine is made, or load them from a checkpoint"
                )
            with torch.no_grad():
                layer.compact.copy_(layer.compact_of(layer.weight))
            self.note(layer)
            return
        self._moved = self._moved or found[:3:2] != self._noted[:3:2]
        self._noted = _state_of(layer)
        if self._uses >= self._next:
            self._next *= 2

    def _is_taken(self, layer: "CompactUnit") -> bool:
        """Whether ``compact`` lies in a larger buffer, as engines put it, and the optimizer knows of no engine."""
        compact = layer.compact
        is_part = compact.untyped_storage().nbytes() > compact.numel() * compact.element_size()
        return is_part and not getattr(self._owner(), "in_engine", True)

    def compares(self, layer: "CompactUnit") -> bool:
        """Whether :meth:`compare` has something to compare."""
        return self.is_on and bool(self._noted) and layer.is_whole()

    def _changed(self, what: str) -> str:
        return (
            f"{self._name}.compact: expected values that only {self._owner_type} changes, got {what}. {self._advice()}"
        )

    def _unseen(self) -> str:
        return (
            f"{self._name}.weight: expected the values that {self._name}.compact stands for, got others, and PyTorch"
            " has counted no change of either: one of them was written to through .data, NumPy or the buffers of"
            " another engine. Edit the weight itself under torch.no_grad(), without .data, and compact follows. Where"
            f" something else trains compact: {self._advice()}"
        )

    def _advice(self) -> str:
        owner = self._owner_type
        return (
            f"Train with the {owner} that was made from this model; under DeepSpeed give it to"
            f" narrowgauge.engine.initialize. For another optimizer call {owner}.revert() first, and make the other one"
            " from the model's parameters afterwards"
        )

    def refuse(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise: ``optimizer``, which is not the layer's, is about to change ``compact``."""
        raise RuntimeError(f"{type(optimizer).__name__}.step: {self._changed(_ANOTHER)}")


class _WatchOfCopy(Watch):
    """Of a layer in a copy of a model, which no optimizer of ours trains; its weight alone is used.

    The copy may be an average of models with several subspaces: the first use takes ``compact`` from the weight.
    """

    _has_begun = False

    def note(self, layer: "CompactUnit") -> None:
        super().note(layer)
        self._has_begun = True
        _watched.add(layer)

    def look(self, layer: "CompactUnit") -> None:
        if not self._has_begun and layer.is_whole():
            layer.take_loaded_weight()
        super().look(layer)

    def _advice(self) -> str:
        return (
            f"The model is a copy of one that {self._owner_type} trains: to train it, build it anew, load this one's"
            " state_dict, and make an optimizer from it"
        )


def watch_layers(layers: Iterable[tuple[str, "CompactUnit"]], owner: torch.optim.Optimizer) -> None:
    """Watch layers of these names, that ``owner`` trains, from now on."""
    _owners.add(owner)
    for name, layer in layers:
        layer.watch = Watch(name, type(owner).__name__, weakref.ref(owner))
        layer.watch.note(layer)
        _watched.add(layer)


def look_before_step(layers: Sequence["CompactUnit"], number: int) -> None:
    """:meth:`Watch.look` at each, and a comparison that asks the device once: the step writes ``compact`` over a part
    of the weight, which half undoes what was written there unseen.

    Compared are some of the rows, others in each step: all would take a third of the time that AdamW's step does.

    Args:
        number: of the step.
    """
    agreed = []
    for layer in layers:
        layer.look()
        if layer.watch is not None and not layer.is_delta and layer.watch.compares(layer):
            every = max(1, min(_ROWS_PER_COMPARED, layer.compact.shape[0] // _LEAST_ROWS))
            agreed.append(layer.agree_in(slice(number % every, None, every)).to(layers[0].compact.device))
    if agreed and not bool(torch.stack(agreed).all()):
        for layer in layers:
            if layer.watch is not None:
                layer.watch.compare(layer)


def unwatch(layer: "CompactUnit") -> None:
    """The layer becomes an ordinary one."""
    layer.watch = None
    _watched.discard(layer)


def _refuse_others(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before any optimizer's step: another one than the layers' own must not hold their ``compact``."""
    # The optimizers that do the work of an owner share its groups.
    if not _watched or any(optimizer.param_groups is owner.param_groups for owner in _owners):
        return
    watches = {id(layer.compact): layer.watch for layer in _watched if layer.watch is not None}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (watch := watches.get(id(parameter))) is not None:
                watch.refuse(optimizer)


register_optimizer_step_pre_hook(_refuse_others)


def _nobody() -> None:
    return None


def _state_of(layer: "CompactUnit") -> tuple[Any, ...]:
    """Of ``compact`` its object, version and memory; the version of ``weight``."""
    compact, weight = layer.compact, layer.weight
    return id(compact), _version(compact), compact.data_ptr(), _version(weight)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
