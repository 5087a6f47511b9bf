"""Notices that a compact layer is changed behind its optimizer's back: its training would be lost without a word."""

import weakref
from collections.abc import Iterable
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


class Watch:
    """Compares a layer's ``compact`` with its ``weight`` whenever something else may have written to one of them.

    What was written is seen by the tensors' version counters, at the cost of two comparisons of numbers per forward.
    They do not count what is written through ``.data``, by fused kernels or into the flat buffers of another engine:
    for these the tensors are compared at every forward once their memory has moved, and now and then if it has not.

    Args:
        name: of the layer.
        owner: the optimizer that trains ``compact``.
    """

    def __init__(self, name: str, owner: torch.optim.Optimizer) -> None:
        self._name, self._owner_type = name, type(owner).__name__
        self._owner = weakref.ref(owner)
        self.is_on, self.honours_weight = True, True
        self._noted: tuple[Any, ...] = ()
        self._moved = False
        self._uses, self._next = 0, _FIRST_COMPARISON

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model has no optimizer yet."""
        return

    def __reduce__(self) -> Any:
        return _nothing, ()

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
        if self._is_taken(layer):
            raise RuntimeError(self._changed())
        if not layer.is_whole():
            # Cut in pieces: by our engine, or by one that the optimizer's step refuses.
            return
        found = _state_of(layer)
        if not layer.agrees():
            # Averaged weights that are swapped in are written to both; other optimizers write to compact alone.
            is_edited = found[3] != self._noted[3]
            if not is_edited:
                raise RuntimeError(self._changed())
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

    def _changed(self) -> str:
        owner = self._owner_type
        return (
            f"{self._name}.compact: expected values that only {owner} changes, got others, which never reach the"
            " layer's weight (another optimizer trains them, or FSDP or another engine has cut them?). Train with the"
            f" {owner} that was made from this model; under DeepSpeed give it to narrowgauge.engine.initialize. For"
            f" another optimizer call {owner}.revert() first, and make the other one from the model's parameters"
            " afterwards"
        )

    def refuse(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise: ``optimizer``, which is not the layer's, is about to change ``compact``."""
        raise RuntimeError(f"{type(optimizer).__name__}.step: {self._changed()}")


def watch_layers(layers: Iterable[tuple[str, "CompactUnit"]], owner: torch.optim.Optimizer) -> None:
    """Watch layers of these names, that ``owner`` trains, from now on."""
    _owners.add(owner)
    for name, layer in layers:
        layer.watch = Watch(name, owner)
        layer.watch.note(layer)
        _watched.add(layer)


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


def _nothing() -> None:
    return None


def _state_of(layer: "CompactUnit") -> tuple[Any, ...]:
    """Of ``compact`` its object, version and memory; the version of ``weight``."""
    compact, weight = layer.compact, layer.weight
    return id(compact), _version(compact), compact.data_ptr(), _version(weight)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
