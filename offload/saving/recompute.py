"""Recomputing transformer layers, so that only their inputs are saved."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .graph import mark_layer_input

# What Hugging Face's layers call their key-value cache, which recomputation would fill a second time.
_WITHOUT_CACHE = {"use_cache": False, "past_key_values": None, "past_key_value": None, "layer_past": None}
_ABSENT = object()
# Whose doing it is that a layer recomputes, while that object is alive.
_owners: WeakKeyDictionary[nn.Module, "Callable[[], RecomputedLayers | None]"] = WeakKeyDictionary()


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model's stacks: every list of two or more modules of one class that is not inside another.

    Raises:
        ValueError: there is none.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or id(module) in inside or len(module) < 2:
            continue
        if len({type(layer) for layer in module}) == 1:
            found += module
            inside |= {id(part) for layer in module for part in layer.modules()}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of equal layers; pass layers=[...] to say what is recomputed"
        )
    return found


class RecomputedLayers:
    """Layers made to recompute their forward in backward, and to announce their inputs."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module] | None) -> None:
        self._before: list[tuple[nn.Module, str, Any]] = []
        # One layer may stand in several places.
        chosen = dict.fromkeys(layers if layers is not None else transformer_layers(model))
        for layer in chosen:
            if layer in _owners and _owners[layer]() is not None:
                kind = type(layer).__name__
                raise ValueError(f"layers: a {kind} is recomputed by another ActivationOffload; close that one first")
        for layer in chosen:
            _owners[layer] = weakref.ref(self)
            own: Any = layer
            if not hasattr(layer, "gradient_checkpointing"):
                self._set(layer, "forward", partial(_recomputed, layer, layer.forward))
                continue
            # Hugging Face's: it recomputes by itself once it is told to.
            recompute: Any = partial(checkpoint, use_reentrant=False)
            if own.gradient_checkpointing:
                recompute = own._gradient_checkpointing_func
            self._set(layer, "_gradient_checkpointing_func", partial(_announced, recompute))
            self._set(layer, "gradient_checkpointing", True)
        for module in model.modules():
            # The flag of what is around them turns off the key-value cache, which recomputation would fill twice.
            is_off = getattr(module, "gradient_checkpointing", None) is False
            if is_off and not chosen.keys().isdisjoint(module.modules()):
                self._set(module, "gradient_checkpointing", True)

    def _set(self, layer: nn.Module, name: str, value: Any) -> None:
        self._before.append((layer, name, vars(layer).get(name, _ABSENT)))
        setattr(layer, name, value)

    def restore(self) -> None:
        """Undo."""
        while self._before:
            layer, name, value = self._before.pop()
            _owners.pop(layer, None)
            delattr(layer, name)
            if value is not _ABSENT:
                setattr(layer, name, value)


def _recomputed(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not layer.training or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    kwargs |= {name: value for name, value in _WITHOUT_CACHE.items() if name in kwargs}
    # Only what is given by position is saved through hooks. What all layers share (masks) need not be.
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and value.requires_grad}
    others = {name: value for name, value in kwargs.items() if name not in tensors}

    def run(*values: Any) -> Any:
        return forward(*values[: len(args)], **others, **dict(zip(tensors, values[len(args) :], strict=True)))

    return _announced(partial(checkpoint, use_reentrant=False), run, *args, *tensors.values())


def _announced(recompute: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    _announce((*args, *kwargs.values()))
    return recompute(function, *args, **kwargs)


def _announce(values: Iterable[Any]) -> None:
    for value in values:
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                mark_layer_input(tensor)
