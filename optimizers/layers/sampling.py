"""Estimates of a linear layer's weight gradient from less than its whole input.

For ``G = dY^T X`` with ``X`` of shape ``(b, n)`` over ``b`` tokens, a :class:`Sampler` says what is kept of ``X`` in
forward, and what ``G`` is taken to be from it in backward. Both estimates are unbiased; outputs, ``dX`` and the bias's
gradient are exact. Random numbers come from one seed a call, drawn from PyTorch's generator of the CPU: whoever sets or
replays that generator, as activation checkpointing does, replays the estimate.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .contents import has_no_contents
from .shared_copy import SharedCopy

# Stands for a norm that is not finite: such a token is kept, so that its gradient is not finite either.
_HUGE = 1e30


@dataclass(frozen=True)
class Projection:
    """A random matrix ``R`` of shape ``(n, r)`` with entries of plus and minus ``1 / sqrt(r)``, made anew at each use.

    Attributes:
        seed: of its signs.
        n, r: its shape.
    """

    seed: int
    n: int
    r: int

    def matrix(self, like: Tensor) -> Tensor:
        """``(n, r)``, in the dtype and on the device of ``like``."""
        if has_no_contents(like):
            return like.new_empty(self.n, self.r)
        generator = torch.Generator(like.device).manual_seed(self.seed)
        bits = torch.randint(2, (self.n, self.r), generator=generator, dtype=torch.int8, device=like.device)
        return (bits.to(like.dtype) * 2 - 1) / math.sqrt(self.r)


@dataclass(frozen=True)
class Kept:
    """What is kept of an input.

    Attributes:
        values: ``(k, n)`` or ``(b, r)``.
        rows: the tokens that ``values`` stem from, int64 ``(k,)``; None for all.
        projection: what ``values`` were multiplied with; None for nothing.
    """

    values: Tensor
    rows: Tensor | None = None
    projection: Projection | None = None


def gradient_of(
    grad_y: Tensor, values: Tensor, rows: Tensor | None, projection: Projection | None, *, transposed: bool = False
) -> Tensor:
    """The estimate of ``dY^T X`` from what is kept of ``X``, or of its transpose.

    Args:
        grad_y: ``(b, m)``.
    """
    if rows is not None:
        grad_y = grad_y.index_select(0, rows)
    found = values.t().mm(grad_y) if transposed else grad_y.t().mm(values)
    if projection is None:
        return found
    back = projection.matrix(found)
    return back.mm(found) if transposed else found.mm(back.t())


class Sampler(Protocol):
    """What is kept of an input."""

    def keep(self, x: Tensor, seed: int) -> Kept:
        """Of an ``x`` of shape ``(b, n)``: ``x`` itself, or memory of its own; called without autograd."""
        ...


class WtaCrs:
    """Winner-take-all column-row sampling (Liu et al. 2023, "Winner-Take-All Column Row Sampling for Memory Efficient
    Adaptation of Language Model", arXiv 2305.15265, Section 3.2): of ``k`` tokens, those with the largest share of the
    sum are kept as they are, the others are drawn from the rest with replacement and scaled to be right in the mean.

    A token's probability is proportional to the norm of its input. The paper's is proportional to the product of that
    and the norm of its output gradient, which it takes from the last epoch over the same examples; here nothing is
    remembered of an example, so that the variance is larger than the paper's where gradients differ much in size.

    Args:
        keep: ``k`` as a share of the tokens, in ``(0, 1]``.
        min_rows: ``k`` is at least this.
    """

    def __init__(self, keep: float, min_rows: int = 10) -> None:
        _check_share(keep)
        if min_rows < 2:
            raise ValueError(f"min_rows: expected at least 2, got {min_rows}")
        self._keep, self._min_rows = keep, min_rows

    def keep(self, x: Tensor, seed: int) -> Kept:
        b = x.shape[0]
        k = max(self._min_rows, round(self._keep * b))
        if k >= b:
            return Kept(x)
        if has_no_contents(x):
            return Kept(x.new_empty(k, x.shape[1]), x.new_empty(k, dtype=torch.int64))
        rows, scale = draw_rows(torch.linalg.vector_norm(x, dim=1, dtype=_at_least_fp32(x)), k, seed)
        values = x.index_select(0, rows)
        return Kept((values.to(scale.dtype) * scale[:, None]).to(x.dtype), rows)

    def __repr__(self) -> str:
        return f"wta_crs, keep={self._keep}"


class Rad:
    """Random projection of the input's features (Oktay et al. 2021, "Randomized Automatic Differentiation", arXiv
    2007.10412, Section 4.2): ``X R`` is kept, with one ``R`` a call, and ``G`` is taken to be ``(dY^T X R) R^T``.

    The squared error is ``(n - 1) / r`` times the square of ``G``, whatever the data: at ``keep`` 0.5 twice that, many
    times that of :class:`WtaCrs`. It wants a small rate and many micro-batches.

    Args:
        keep: ``r`` as a share of the features, in ``(0, 1]``.
    """

    def __init__(self, keep: float) -> None:
        _check_share(keep)
        self._keep = keep

    def keep(self, x: Tensor, seed: int) -> Kept:
        n = x.shape[1]
        r = math.ceil(self._keep * n)
        if r >= n:
            return Kept(x)
        projection = Projection(seed, n, r)
        return Kept(x.mm(projection.matrix(x)), None, projection)

    def __repr__(self) -> str:
        return f"rad, keep={self._keep}"


class SampledInputs:
    """A sampler for layers that may be called with the same input, which is then sampled once.

    Args:
        num_layers: of these.
        note: told of each input that is sampled.
    """

    def __init__(self, sampler: Sampler, num_layers: int, note: Callable[[Tensor], None]) -> None:
        self.sampler, self._shared, self._note = sampler, SharedCopy(num_layers), note

    def keep(self, x: Tensor, key: Hashable, read: Callable[[], Tensor]) -> Kept:
        """What is kept of the part of ``x`` that a layer needs.

        One seed is drawn for each call, so that a forward that is repeated draws as many, whoever shares.

        Args:
            key: of that part.
            read: makes it, of shape ``(b, n)``.

        Raises:
            RuntimeError: within ``torch.compile``, which cannot replay the draws.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("sampled backward: expected layers that run without torch.compile, got compiled ones")
        seed = 0 if has_no_contents(x) else int(torch.randint(torch.iinfo(torch.int64).max, ()))
        self._note(x)

        @torch.no_grad()
        def make() -> Kept:
            return self.sampler.keep(read().detach(), seed)

        return self._shared.get(x, (key,), make) if torch.is_grad_enabled() else make()


def draw_rows(norms: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose ``k`` of ``b`` tokens so that the sum of the chosen, each times its scale, is the sum of all in the mean.

    Args:
        norms: ``(b,)``, proportional to the probabilities; ``k < b``.

    Returns:
        The tokens, int64 ``(k,)``, and their scales, of the dtype of ``norms``. Nothing waits for the device.
    """
    weights = torch.nan_to_num(norms, nan=_HUGE, posinf=_HUGE).double()
    total = weights.sum()
    p = torch.where(total > 0, weights / total, 1 / norms.numel())
    largest, order = p.sort(descending=True, stable=True)
    # What is left after the m largest, for m in 0 .. b - 1.
    tails = largest.flip(0).cumsum(0).flip(0)
    m = (tails[:k] / torch.arange(k, 0, -1, device=p.device)).argmin()
    # Drawn in the tokens' own order: the last digit of a norm that is nearly another's must not change what is drawn.
    is_drawn = torch.arange(p.numel(), device=p.device) >= m
    rest = torch.zeros_like(p).index_copy_(0, order, largest * is_drawn)
    # Where nothing is left anything may be drawn, for it counts nothing.
    rest = torch.where(tails[m] > 0, rest, torch.ones_like(rest))
    generator = torch.Generator(p.device).manual_seed(seed)
    drawn = rest.multinomial(k, replacement=True, generator=generator)
    scale = tails[m] / (rest[drawn] * (k - m))
    is_winner = torch.arange(k, device=p.device) < m
    return torch.where(is_winner, order[:k], drawn), torch.where(is_winner, 1, scale).to(norms.dtype)


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_share(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share in (0, 1], got {keep}")
