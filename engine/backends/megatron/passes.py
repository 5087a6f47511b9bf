"""The order in which a process rank does its forwards and backwards. Plain numbers: nothing of Megatron's.

Megatron's schedules: without a pipeline each backward follows its forward; 1F1B (Narayanan et al., 2021, arXiv
2104.04473, section 2.2.1) and the interleaved schedule (section 2.2.2), in which groups of as many micro-batches as
there are stages go through one chunk after the other.
"""

from itertools import pairwise

from narrowgauge.offload import MicroBatch, Schedule
from narrowgauge.offload.schedule import Pass

from .layout import Layout, Place


def schedule_of(layout: Layout, place: Place, num_micro_batches: int) -> Schedule:
    """A step's passes on a process rank.

    Where other stages hold several micro-batches, those whose backward follows at once, as on the last stage, are kept:
    they are one at a time.
    """
    passes = _passes(layout, place, num_micro_batches)
    at_once = {before[1] for before, after in pairwise(passes) if after == ("backward", before[1])}
    return Schedule(passes, kept=at_once if layout.pipeline > 1 else ())


def _passes(layout: Layout, place: Place, num_micro_batches: int) -> list[Pass]:
    forwards: list[MicroBatch] = []
    backwards: list[MicroBatch] = []
    size = layout.pipeline if layout.chunks > 1 else num_micro_batches
    for first in range(0, num_micro_batches, size):
        group = range(first, min(first + size, num_micro_batches))
        for chunk in range(layout.chunks):
            forwards += [MicroBatch(number, chunk) for number in group]
            backwards += [MicroBatch(number, layout.chunks - 1 - chunk) for number in group]
    ahead = min(_warm_up(layout, place), len(forwards))
    passes: list[Pass] = [("forward", of) for of in forwards[:ahead]]
    for of, other in zip(forwards[ahead:], backwards, strict=False):
        passes.append(("forward", of))
        passes.append(("backward", other))
    passes.extend(("backward", of) for of in backwards[len(forwards) - ahead :])
    return passes


def _warm_up(layout: Layout, place: Place) -> int:
    """Forwards before the one that the first backward follows."""
    later = layout.pipeline - place.pipeline - 1
    return later if layout.chunks == 1 else 2 * later + (layout.chunks - 1) * layout.pipeline
