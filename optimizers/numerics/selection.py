"""Selection rules: which columns or rows of a weight the next subspace holds.

A rule is a pure function of ``(norms, rank, generator)``. Every process rank seeds the generator from the same
``(seed, refresh, layer name)``, and norms are the same on all of them, so all ranks choose the same subspace without
talking to each other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .seeds import derive_seed


@dataclass(frozen=True)
class SelectionRule:
    """How a subspace is chosen.

    Attributes:
        select: ``(norms, rank, generator) -> index``, int64 of shape ``(rank,)`` in ``[0, norms.numel())``, sorted;
            without repeats unless ``repeats``. ``norms`` is fp64 ``(dim,)``, at least 0, on the CPU.
        contiguous: the indices are always ``start, start + 1, ...``, so a slice can stand for a gather.
        uses_norms: the choice depends on the gradient's norms; the others read only how many there are.
        repeats: entries are drawn with replacement, and scaled by :func:`replacement_scales`.
    """

    select: Callable[[Tensor, int, torch.Generator], Tensor]
    contiguous: bool = False
    uses_norms: bool = False
    repeats: bool = False


def _uniform(norms: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(norms.numel(), generator=generator)[:rank].sort().values


def _block(norms: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """One of the ``ceil(dim / rank)`` blocks of ``rank`` neighbours; the last one ends at ``dim``."""
    dim = norms.numel()
    num_blocks = -(-dim // rank)
    block = int(torch.randint(num_blocks, (1,), generator=generator))
    start = min(block * rank, dim - rank)
    return torch.arange(start, start + rank)


def _top(norms: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The largest norms; among equal ones the first."""
    return norms.sort(descending=True, stable=True).indices[:rank].sort().values


def _multinomial(norms: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """One after the other without replacement, each with a probability proportional to its norm.

    Drawn at once as the largest of ``log(norm) + Gumbel noise`` (Efraimidis and Spirakis, 2006). Entries of norm 0 are
    taken, at random, only when no others are left.
    """
    noise = torch.empty_like(norms).exponential_(generator=generator).log()
    smallest = torch.finfo(norms.dtype).tiny
    return (
        ((norms / norms.max().clamp_min(smallest)).clamp_min(smallest).log() - noise).topk(rank).indices.sort().values
    )


def _multinomial_replacement(norms: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    return _probabilities(norms).multinomial(rank, replacement=True, generator=generator).sort().values


def _probabilities(norms: Tensor) -> Tensor:
    """``q``: proportional to the norms, uniform where there is no gradient."""
    total = norms.sum()
    return norms / total if total > 0.0 else torch.full_like(norms, 1.0 / norms.numel())


def replacement_scales(norms: Tensor, index: Tensor) -> Tensor:
    """``rho = 1 / sqrt(r q_i)`` of each drawn entry, fp64 ``(r,)``, with which ``E[P P^T] = I``."""
    return (index.numel() * _probabilities(norms)[index]).rsqrt()


# Muhamed et al. (2024), arXiv 2406.17660. The norm itself, not its square: among independent draws that is
# what minimises the variance of P P^T G, whose expected square is sum_i |G_i|^2 / (r q_i) up to a constant.
SELECTION_RULES: dict[str, SelectionRule] = {
    "uniform": SelectionRule(_uniform),
    "block": SelectionRule(_block, contiguous=True),
    "top": SelectionRule(_top, uses_norms=True),
    "multinomial": SelectionRule(_multinomial, uses_norms=True),
    "multinomial_replacement": SelectionRule(_multinomial_replacement, uses_norms=True, repeats=True),
}


def select_index(
    rule: SelectionRule,
    dim: int,
    rank: int,
    *,
    seed: int,
    refresh: int,
    name: str,
    norms: Tensor | None = None,
    strata: int = 1,
) -> Tensor:
    """The index of layer ``name`` for the ``refresh``-th subspace, int64 of shape ``(rank,)``, on the CPU.

    Args:
        norms: of the gradient's columns or rows, fp64 ``(dim,)``, on the CPU; without them the choice is uniform.
        strata: as many are taken from each of so many equal blocks of neighbours; divides ``dim`` and ``rank``.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, refresh, name))
    if norms is None:
        norms = torch.ones(dim, dtype=torch.float64)
        if rule.uses_norms and not rule.repeats:
            rule = SELECTION_RULES["uniform"]
    size, share = dim // strata, rank // strata
    return torch.cat([rule.select(block, share, generator) + i * size for i, block in enumerate(norms.split(size))])
