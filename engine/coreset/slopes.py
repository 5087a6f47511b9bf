"""Losses of single examples, and their slopes along directions in the weight of one linear layer.

``y + eps x Z'`` is the layer's output with the weight ``W + eps Z``: a hook adds it, and no parameter is written to. So
it is the same for weights that are sharded, compact, quantised or an adapter's, and nothing has to be restored.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from ..micro_batch import NOT_LEARNED, MicroBatch


@torch.no_grad()
def example_losses(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The mean loss over the learned tokens of each example, float32 ``(examples,)``."""
    inputs = {name: value for name, value in batch.inputs().items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1].float()
    labels = batch.labels[:, 1:]
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NOT_LEARNED, reduction="none")
    learned = (labels != NOT_LEARNED).sum(1)
    return losses.view(labels.shape).sum(1) / learned


@torch.no_grad()
def slopes(
    model: nn.Module, name: str, batch: MicroBatch, directions: Tensor, epsilon: float, *, whole_forwards: bool
) -> Tensor:
    """``(L_i(W + eps Z_d) - L_i(W - eps Z_d)) / (2 eps)`` for each example and direction, float64 ``(examples, D)``.

    Args:
        name: of the layer.
        directions: ``(D, out, in)``.
        whole_forwards: else only the first of the ``2 D`` forwards computes the layers below the block with the layer.
    """
    layer, found = model.get_submodule(name), []
    replay = _Replay(model, name)
    for direction in directions:
        sides = []
        for sign in (1.0, -1.0):
            with _moved(layer, direction, sign * epsilon), nullcontext() if whole_forwards else replay.forward():
                sides.append(example_losses(model, batch).double())
        found.append((sides[0] - sides[1]) / (2 * epsilon))
    return torch.stack(found, dim=1)


@contextmanager
def _moved(layer: nn.Module, direction: Tensor, step: float) -> Iterator[None]:
    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + step * linear(args[0], direction.to(args[0].dtype)).to(output.dtype)

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


class _Replay:
    """Forwards that begin at the block with a layer, with what the block was given in the first of them."""

    def __init__(self, model: nn.Module, name: str) -> None:
        lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        path = min((path for path in lists if name.startswith(f"{path}.")), key=len, default=None)
        self._below: list[nn.Module] = []
        self._block: nn.Module | None = None
        self._given: tuple[Any, Any] | None = None
        if path is not None:
            number = int(name[len(path) + 1 :].partition(".")[0])
            self._below, self._block = list(lists[path])[:number], lists[path][number]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One forward of the model is made inside."""
        if self._block is None:
            yield
        elif self._given is None:
            with self._recorded(self._block):
                yield
        else:
            with self._begun_at(self._block, self._given):
                yield

    @contextmanager
    def _recorded(self, block: nn.Module) -> Iterator[None]:
        outputs: list[Any] = []
        given: list[tuple[Any, Any]] = []
        handles: list[Any] = [
            b.register_forward_hook(lambda _, __, output: outputs.append(output)) for b in self._below
        ]
        handles.append(
            block.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        # Of blocks that hand on more than hidden states it is not known what the next one needs.
        if all(isinstance(output, Tensor) for output in outputs) and len(given) == 1:
            self._given = given[0]
        else:
            self._block = None

    @contextmanager
    def _begun_at(self, block: nn.Module, given: tuple[Any, Any]) -> Iterator[None]:
        handle = block.register_forward_pre_hook(lambda _, args, kwargs: given, with_kwargs=True)
        for below in self._below:
            vars(below)["forward"] = _unchanged
        try:
            yield
        finally:
            handle.remove()
            for below in self._below:
                del vars(below)["forward"]


def _unchanged(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]
