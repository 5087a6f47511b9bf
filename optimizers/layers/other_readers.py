"""Noticing layers that keep the whole of an input that others sample, so that no memory is saved."""

import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .registry import is_target


class OtherReaders:
    """Looks at the first forward, in training, of each linear layer that is not sampled; warns once for each kind.

    Args:
        model: with the layers.
        sampled: the names of those that sample.
    """

    def __init__(self, model: nn.Module, sampled: Collection[str]) -> None:
        self._told: set[str] = set()
        for name, module in model.named_modules():
            if is_target(module) and module.weight.requires_grad and name not in sampled:
                _Look(self, name, module)

    def note_sampled(self, x: Tensor) -> None:
        """A layer samples ``x``."""
        storage: Any = x.untyped_storage()
        for name in getattr(storage, "_narrowgauge_whole", ()):
            self.tell(name)
        storage._narrowgauge_sampled = True

    def tell(self, name: str) -> None:
        """Warn of a layer, but for those whose last name was told."""
        kind = name.rpartition(".")[2]
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(
                f"sampled backward: {name} keeps the whole of an input that other layers sample: memory falls only"
                " where all its readers do (target_modules)",
                stacklevel=2,
            )


class _Look:
    """A hook on one layer that is gone after its first forward."""

    def __init__(self, readers: OtherReaders, name: str, module: nn.Module) -> None:
        self._readers, self._name = readers, name
        self._handle = module.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not (module.training and torch.is_grad_enabled() and inputs and torch.is_tensor(inputs[0])):
            return
        self._handle.remove()
        storage: Any = inputs[0].untyped_storage()
        if getattr(storage, "_narrowgauge_sampled", False):
            self._readers.tell(self._name)
        storage._narrowgauge_whole = (*getattr(storage, "_narrowgauge_whole", ()), self._name)
