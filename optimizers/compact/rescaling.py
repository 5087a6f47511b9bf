"""By what gradients were scaled between backward and step: probes are no parameters, and are not scaled with them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers.targets import CompactLayer
from ..sharding.communicator import Communicator
from .backend import SubspaceBackend

# Gradients are compared in so many of a layer's elements.
_NUM_ELEMENTS = 4096
# How far rounding, in bf16 too, may bring the two sums apart.
_TOLERANCE = 0.05


class Rescaling:
    """Finds by what compact gradients were multiplied after backward, as ``GradScaler.unscale_`` does.

    A sum of each compact gradient with random signs is taken in backward, before anybody can change it. It is linear:
    micro-batches add up, and process ranks are averaged as their gradients are.
    """

    def __init__(self, layers: Sequence[CompactLayer]) -> None:
        self._layers = list(layers)
        self._sums: dict[str, Tensor] = {}
        self._signs = torch.randint(2, (_NUM_ELEMENTS,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
        for layer in self._layers:
            layer.module.compact.register_hook(self._observer(layer.name))

    def _observer(self, name: str) -> Any:
        def observe(gradient: Tensor) -> None:
            found = self._sum(gradient.detach())
            self._sums[name] = self._sums[name] + found if name in self._sums else found

        return observe

    def _sum(self, gradient: Tensor) -> Tensor:
        values = gradient.reshape(-1)[:_NUM_ELEMENTS].double()
        if self._signs.device != values.device:
            self._signs = self._signs.to(values.device)
        return values @ self._signs[: values.numel()]

    def forget(self) -> None:
        """The gradients are zero again."""
        self._sums.clear()

    def factor(self, backend: SubspaceBackend) -> float:
        """By what the gradients were multiplied since backward; 1 if it cannot be told. Collective."""
        members: dict[Communicator, list[Tensor]] = {}
        for layer in self._layers:
            gradient, own = layer.module.compact.grad, self._sums.get(layer.name)
            zero = torch.zeros((), dtype=torch.float64, device=layer.module.compact.device)
            pair = torch.stack(
                [self._sum(gradient) if gradient is not None else zero, own if own is not None else zero]
            )
            members.setdefault(backend.communicator(layer.name), []).append(pair)
        if not members:
            return 1.0
        averaged = [communicator.average_(torch.stack(pairs)).cpu() for communicator, pairs in members.items()]
        found, wanted = torch.cat(averaged).unbind(1)
        # The factor with the least squared error over the layers.
        factor = float((found * wanted).sum() / wanted.square().sum())
        if not math.isfinite(factor) or factor <= 0.0 or abs(factor - 1.0) < _TOLERANCE:
            return 1.0
        power = 2.0 ** round(math.log2(factor))
        return power if abs(factor / power - 1.0) < _TOLERANCE else factor
