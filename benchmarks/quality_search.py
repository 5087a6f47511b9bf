"""Which runs a sweep needs next: a pure function of the losses found so far.

AdamW: a full grid over both rates at beta2 = 0.999; then, as for every method, the coordinate search from the best
point of it; then beta2 = 0.95 at the best rates, and the coordinate search again with the better beta2, which all
others use. Every other method: the coordinate search, begun at AdamW's best rates (the matrices' times the method's
``start``).

The coordinate search tries three matrix rates a factor 2 apart and extends them by one while the best is at an edge;
then the same with the other parameters' rate, at the best matrix rate. A task with one rate of the other parameters
keeps it, and beta2 = 0.999, throughout.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.quality_run import Rates

BETA2 = (0.999, 0.95)
_LONGEST = 8

Losses = Callable[[Rates], float | None]
"""The loss at these rates: None if they have not been tried, infinity if training diverged."""


@dataclass(frozen=True)
class Progress:
    """What is needed next and, once nothing is, the best rates."""

    missing: Sequence[Rates] = ()
    best: Rates | None = None


def _best_of(losses: Losses, tried: Sequence[Rates]) -> Progress:
    found = {rates: loss for rates in tried if (loss := losses(rates)) is not None}
    missing = [rates for rates in tried if rates not in found]
    return Progress(missing) if missing else Progress(best=min(found, key=lambda rates: found[rates]))


def search_line(losses: Losses, start: Rates, key: Literal["lr", "matrix_lr"]) -> Progress:
    """Search one rate around ``start``."""
    middle = getattr(start, key)
    line = [replace(start, **{key: value}) for value in (middle / 2, middle, 2 * middle)]
    while True:
        progress = _best_of(losses, line)
        if progress.best is None or len(line) == _LONGEST or progress.best not in (line[0], line[-1]):
            return progress
        if progress.best == line[0]:
            line.insert(0, replace(start, **{key: getattr(line[0], key) / 2}))
        else:
            line.append(replace(start, **{key: 2 * getattr(line[-1], key)}))


def search_rates(losses: Losses, start: Rates, *, of_matrices: bool = True, of_others: bool = True) -> Progress:
    """The coordinate search from ``start``.

    Args:
        of_matrices, of_others: their rate counts.
    """
    progress = search_line(losses, start, "matrix_lr") if of_matrices else _best_of(losses, [start])
    return search_line(losses, progress.best, "lr") if of_others and progress.best is not None else progress


def search_only(losses: Losses, start: Rates, matrix_lr: Sequence[float]) -> Progress:
    """These matrix rates and no others."""
    return _best_of(losses, [replace(start, matrix_lr=rate) for rate in matrix_lr])


def search_baseline(losses: Losses, grid_lr: Sequence[float], grid_matrix_lr: Sequence[float]) -> Progress:
    """AdamW's own search."""
    if len(grid_lr) == 1:
        return search_rates(losses, Rates(grid_lr[0], grid_matrix_lr[0], BETA2[0]), of_others=False)
    grid = [Rates(lr, matrix_lr, BETA2[0]) for lr, matrix_lr in itertools.product(grid_lr, grid_matrix_lr)]
    progress = _best_of(losses, grid)
    if progress.best is not None:
        progress = search_rates(losses, progress.best)
    if progress.best is not None:
        progress = _best_of(losses, [replace(progress.best, beta2=beta2) for beta2 in BETA2])
    if progress.best is not None:
        progress = search_rates(losses, progress.best)
    return progress
