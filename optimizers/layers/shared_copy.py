"""One copy of the selected entries of an input, for all layers that are called with that input."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class _Kept:
    """A copy that not all layers have asked for yet.

    Attributes:
        storage: of the input, weak.
        key: what else makes an input the same: how it lies in the storage, its version, and what is made of it.
        uses_left: how many layers may still ask.
    """

    storage: "weakref.ref[torch.UntypedStorage]"
    key: tuple[Any, ...]
    copy: Any
    uses_left: int


class SharedCopy:
    """Hands the copy that the first layer of a group made to the others, so that autograd keeps it once.

    An input is known by its storage, not by its tensor: an engine may give each layer a new alias of it. It is not kept
    alive. The copy is held until every layer of the group has had it, or the input is gone. A change of the input in
    place counts as another input; like autograd, this does not see changes through ``.data``. Threads that race for it
    make a copy too many, never take a wrong one.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._kept: _Kept | None = None

    def __reduce__(self) -> Any:
        return SharedCopy, (self._num_layers,)

    def get(self, x: Tensor, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """The copy for ``x``.

        Args:
            key: on what else it depends, such as the index and the dtype.
            make: makes it.
        """
        if x.is_inference():
            return make()
        storage = x.untyped_storage()
        layout = (x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        # What another stream was told to do may not have been done yet when this one's work begins.
        whole_key = (*key, *layout, _stream(x))
        kept = self._kept
        if kept is not None and kept.storage() is storage and kept.key == whole_key:
            self._kept = replace(kept, uses_left=kept.uses_left - 1) if kept.uses_left > 1 else None
            return kept.copy
        copy = make()
        self._kept = _Kept(weakref.ref(storage, self._forget), whole_key, copy, self._num_layers - 1)
        return copy

    @property
    def copy(self) -> Any:
        """The copy that is held now, for layers of the group that have not had it yet."""
        return self._kept.copy if self._kept is not None else None

    def _forget(self, storage: "weakref.ref[torch.UntypedStorage]") -> None:
        kept = self._kept
        if kept is not None and kept.storage is storage:
            self._kept = None


def _stream(x: Tensor) -> Any:
    """The stream that work on ``x`` is queued on; None on the CPU."""
    return None if x.device.type == "cpu" else torch.accelerator.current_stream(x.device)
