"""Selection rules: which columns or rows of a weight the next subspace holds.

A rule is a pure function of ``(dim, rank, generator)``. Every process rank seeds the generator from the same
``(seed, refresh, layer name)``, so all ranks choose the same subspace without talking to each other.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SelectionRule:
    """How a subspace is chosen.

    Attributes:
        select: ``(dim, rank, generator) -> index``, int64 of shape ``(rank,)``, sorted, without repeats, in ``[0,
            dim)``.
        contiguous: the indices are always ``start, start + 1, ...``, so a slice can stand for a gather.
    """

    select: Callable[[int, int, torch.Generator], torch.Tensor]
    contiguous: bool


def _uniform(dim: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(dim, generator=generator)[:rank].sort().values


def _block(dim: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """One of the ``ceil(dim / rank)`` blocks of ``rank`` neighbours; the last one ends at ``dim``."""
    num_blocks = -(-dim // rank)
    block = int(torch.randint(num_blocks, (1,), generator=generator))
    start = min(block * rank, dim - rank)
    return torch.arange(start, start + rank)


SELECTION_RULES: dict[str, SelectionRule] = {
    "uniform": SelectionRule(_uniform, contiguous=False),
    "block": SelectionRule(_block, contiguous=True),
}


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def select_index(rule: SelectionRule, dim: int, rank: int, *, seed: int, refresh: int, name: str) -> torch.Tensor:
    """The index of layer ``name`` for the ``refresh``-th subspace, int64 of shape ``(rank,)``, on the CPU."""
    generator = torch.Generator().manual_seed(derive_seed(seed, refresh, name))
    return rule.select(dim, rank, generator)
