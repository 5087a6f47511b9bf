"""A model's whole weights, put together on process rank 0 from the boxes that all ranks hold, and read back."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...protocol import WeightSource
from .layout import Place
from .model import StagedModel
from .parts import LocalParameter, Part, local_parameters

Gathered = Callable[[Sequence[Tensor]], AbstractContextManager[Any]]


def is_first_copy(parameter: LocalParameter, place: Place) -> bool:
    """Of the process ranks that hold the same part of the same parameter, this is the first."""
    return parameter.is_held_first_by(place) and parameter.copy_on(place) == 0


class Gathering:
    """Gathers a model's weights, one after the other.

    Args:
        shapes: of all weights, by Hugging Face's names.
        gathered: within it parameters are whole here. Collective over the data-parallel ranks.
    """

    def __init__(
        self, model: StagedModel, shapes: Mapping[str, tuple[int, ...]], *, gathered: Gathered = lambda _: nullcontext()
    ) -> None:
        self._model, self._shapes, self._gathered = model, shapes, gathered
        # By weight and process rank, all parts of a first copy, as every rank computes them.
        self._owners: dict[str, dict[int, list[Part]]] = {name: {} for name in shapes}
        for place in model.layout.places():
            for chunk in range(model.layout.chunks):
                for parameter in local_parameters(model.architecture, model.layout, place, chunk):
                    if is_first_copy(parameter, place):
                        for part in parameter.parts:
                            self._owners[part.name].setdefault(place.process_rank, []).append(part)

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Collective. The values are there on process rank 0 alone; the others get empty tensors."""
        held: dict[str, list[tuple[LocalParameter, Tensor]]] = {}
        for parameter, tensor in self._model.local_parameters():
            for name in dict.fromkeys(part.name for part in parameter.parts):
                held.setdefault(name, []).append((parameter, tensor))
        rank = dist.get_rank()
        for name, shape in self._shapes.items():
            here = held.get(name, [])
            with self._gathered([tensor for _, tensor in here]) if here else nullcontext():
                own = [*self._own_parts(name, here)]
                if rank == 0:
                    whole = self._whole(name, shape, own)
                else:
                    whole = torch.empty(0)
                    if rank in self._owners[name]:
                        dist.send(torch.cat([part.reshape(-1) for part in own]), dst=0)
            yield name, whole

    def _own_parts(self, name: str, held: Sequence[tuple[LocalParameter, Tensor]]) -> Iterator[Tensor]:
        for parameter, tensor in held:
            if is_first_copy(parameter, self._model.place):
                yield from (part.of_tensor(tensor.detach()) for part in parameter.parts if part.name == name)

    def _whole(self, name: str, shape: tuple[int, ...], own: list[Tensor]) -> Tensor:
        like = next(self._model.parameters())
        whole = torch.empty(shape, dtype=like.dtype, device=like.device)
        for source, parts in self._owners[name].items():
            values = own if source == 0 else self._received(source, parts, like)
            for part, value in zip(parts, values, strict=True):
                part.of_weight(whole).copy_(value)
        return whole

    def _received(self, source: int, parts: list[Part], like: Tensor) -> list[Tensor]:
        message = torch.empty(sum(part.numel for part in parts), dtype=like.dtype, device=like.device)
        dist.recv(message, src=source)
        pieces = message.split([math.prod(part.box.local) for part in parts])
        return [piece.view(part.box.local) for piece, part in zip(pieces, parts, strict=True)]


@torch.no_grad()
def read_weights(model: StagedModel, source: WeightSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Take this process rank's parts of the weights.

    Raises:
        ValueError: a weight is missing or has another shape; nothing has been read then.
    """
    check_shapes(source, shapes)
    fill_from(source, [(parameter, tensor.detach()) for parameter, tensor in model.local_parameters()])


def check_shapes(source: WeightSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """
    Raises:
        ValueError: a weight is missing or has another shape.
    """
    for name, expected in shapes.items():
        found = source.shape(name)
        if found != expected:
            got = "nothing" if found is None else list(found)
            raise ValueError(f"{name}: expected shape {list(expected)}, got {got}")


def fill_from(source: WeightSource, local: Iterable[tuple[LocalParameter, Tensor]]) -> None:
    """Take what belongs to these parameters, each weight read once."""
    targets: dict[str, list[tuple[LocalParameter, Tensor]]] = {}
    for parameter, tensor in local:
        for name in dict.fromkeys(part.name for part in parameter.parts):
            targets.setdefault(name, []).append((parameter, tensor))
    for name, held in targets.items():
        weight = source.read(name)
        for parameter, tensor in held:
            parameter.fill(tensor, name, weight)
