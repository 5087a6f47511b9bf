"""How a model is cut over process ranks, and where each of them stands. Plain numbers: nothing of Megatron's.

The order is Megatron's: neighbouring ranks share a layer's matrices, then come those that share a sequence, then the
data-parallel ones, then the stages of the pipeline. Experts are cut in an order of their own ("folded"): neighbours
share an expert's matrices, then come the ranks with other experts, then those with the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a configuration says of a layout.

    Attributes:
        tensor: process ranks that share each matrix.
        pipeline: stages.
        chunks: pieces of layers on each stage.
        context: process ranks that share each sequence.
        expert: process ranks with different experts.
        expert_tensor: process ranks that share each expert's matrices.
        sequence_parallel: norms and residuals are cut over the ``tensor`` ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout(Sizes):
    """Sizes on a number of process ranks.

    Attributes:
        data: process ranks that train on different data.
        expert_data: process ranks with the same part of the same experts.
    """

    data: int = 1
    expert_data: int = 1

    @classmethod
    def of(cls, sizes: Sizes, world_size: int) -> "Layout":
        """
        Raises:
            ValueError: ``key: expected ..., got ...``: it does not fit the number of process ranks.
        """
        dense = sizes.tensor * sizes.context * sizes.pipeline
        experts = sizes.expert_tensor * sizes.expert * sizes.pipeline
        if world_size % dense:
            context = f" x context_parallel ({sizes.context})" if sizes.context > 1 else ""
            raise ValueError(
                f"tensor_parallel: expected tensor_parallel ({sizes.tensor}){context} x pipeline_parallel"
                f" ({sizes.pipeline}) to divide the number of process ranks, got {world_size}"
                f"{_nearest([sizes.tensor, *([sizes.context] if context else []), sizes.pipeline], world_size)}"
            )
        if world_size % experts:
            raise ValueError(
                f"expert_parallel: expected expert_tensor_parallel ({sizes.expert_tensor}) x expert_parallel"
                f" ({sizes.expert}) x pipeline_parallel ({sizes.pipeline}) to divide the number of process ranks, got"
                f" {world_size}{_nearest([sizes.expert_tensor, sizes.expert, sizes.pipeline], world_size)}"
            )
        return cls(**vars(sizes), data=world_size // dense, expert_data=world_size // experts)

    @property
    def world_size(self) -> int:
        return self.tensor * self.replicas * self.pipeline

    @property
    def replicas(self) -> int:
        """Process ranks with the same part of what is not of experts: they train on other data, or share sequences."""
        return self.context * self.data

    @property
    def length_divisor(self) -> int:
        """What divides the length of a sequence: each context rank has two pieces of it, cut once more over the
        ``tensor`` ranks under sequence parallelism.
        """
        pieces = 2 * self.context if self.context > 1 else 1
        return math.lcm(pieces, self.context * self.tensor) if self.sequence_parallel else pieces

    @property
    def length_shares(self) -> int:
        """Process ranks among which a sequence lies between layers."""
        return self.context * (self.tensor if self.sequence_parallel else 1)

    @property
    def splits_experts(self) -> bool:
        """Experts are reduced over other process ranks than the rest."""
        return self.expert > 1 or self.expert_tensor != self.tensor

    def place_of(self, process_rank: int) -> "Place":
        left, tensor = divmod(process_rank, self.tensor)
        pipeline, replica = divmod(left, self.replicas)
        data, context = divmod(replica, self.context)
        left, expert_tensor = divmod(process_rank, self.expert_tensor)
        left, expert = divmod(left, self.expert)
        return Place(
            process_rank=process_rank,
            tensor=tensor,
            context=context,
            data=data,
            replica=replica,
            pipeline=pipeline,
            expert_tensor=expert_tensor,
            expert=expert,
            expert_data=left % self.expert_data,
        )

    def places(self) -> "list[Place]":
        return [self.place_of(process_rank) for process_rank in range(self.world_size)]

    def layers_of(self, place: "Place", chunk: int, num_layers: int) -> range:
        """The layers of a chunk on a stage: chunks go round the stages."""
        size = num_layers // (self.pipeline * self.chunks)
        first = (chunk * self.pipeline + place.pipeline) * size
        return range(first, first + size)

    def is_first(self, place: "Place", chunk: int) -> bool:
        """Whether the chunk begins with the embedding."""
        return place.pipeline == 0 and chunk == 0

    def is_last(self, place: "Place", chunk: int) -> bool:
        """Whether the chunk ends with the head."""
        return place.pipeline == self.pipeline - 1 and chunk == self.chunks - 1

    def describe(self) -> str:
        """``TP2 PP2 DP4``, without what is 1 and what is told by the rest."""
        dense = [("TP", self.tensor), ("CP", self.context), ("PP", self.pipeline), ("VPP", self.chunks)]
        parts = [*dense, ("EP", self.expert)]
        names = [f"{name}{size}" for name, size in parts if size > 1]
        if self.expert_tensor != self.tensor:
            names.append(f"ETP{self.expert_tensor}")
        return " ".join([*names, f"DP{self.data}", *(["SP"] if self.sequence_parallel else [])])


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process rank's position on each axis of a layout; ``replica`` counts ``context`` and ``data``."""

    process_rank: int
    tensor: int
    context: int
    data: int
    replica: int
    pipeline: int
    expert_tensor: int
    expert: int
    expert_data: int


def _nearest(wanted: Sequence[int], world_size: int) -> str:
    """``; nearest that fit: ...``: the products of the sizes that divide the ranks, nearest first."""
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    fitting = [found for found in product(divisors, repeat=len(wanted)) if world_size % math.prod(found) == 0]

    def distance(found: tuple[int, ...]) -> float:
        return sum(abs(size / own - 1) for size, own in zip(found, wanted, strict=True))

    best = sorted(fitting, key=distance)[:3]
    return "; nearest that fit: " + ", ".join(" x ".join(map(str, found)) for found in best)
