"""How the examples of a source become samples of at most ``sequence_length`` tokens: which are held out, what is cut
off, and which share a sample. On disk, memory-mapped.

``spans.bin`` has three int64 per span of tokens: where it begins in the source's tokens, its length, and how many of
its tokens are learned, of which the first never is one: nothing predicts it. ``samples.bin`` has three int64 per
sample: the number of spans up to its end, its tokens, and how many of them are learned.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ..files import read_json, write_json
from .example_file import ExampleFile
from .order import sample_order
from .packing import best_fit_decreasing

# What is looked at in one go.
_TOKENS, _WINDOW = 1 << 22, 1 << 16
_META = "layout.json"
_NO_SEED = 0
Table = npt.NDArray[np.int64]


class NothingLearned(Exception):
    """An example has no token to learn among those that are kept; ``args`` are its number and its length."""


@dataclass(frozen=True)
class Rules:
    """What makes samples of examples.

    Attributes:
        cut: examples that are too long are cut into several spans, each of which begins with the last token of the one
            before; else they are truncated, or dropped.
    """

    sequence_length: int
    packing: bool
    cut: bool
    drop: bool


@dataclass
class Counts:
    """What became of a source's examples on one side, training or validation.

    Attributes:
        tokens: of the spans, without padding.
        longest: tokens of the longest example, before anything is cut off.
        cut: examples that became several spans.
    """

    examples: int = 0
    samples: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: int = 0
    cut: int = 0


def describe(counts: Mapping[str, int]) -> str:
    """:class:`Counts`, as a dict, in a line."""
    examples = counts["examples"]
    parts = [
        f"{examples:,} examples in {counts['samples']:,} samples",
        f"{counts['tokens']:,} tokens, of which {counts['learned']:,} are learned",
        f"the longest example has {counts['longest']:,}",
    ]
    done = {"truncated": "truncated", "dropped": "left out as too long", "cut": "cut into several"}
    parts += [f"{counts[key]:,} ({counts[key] / examples:.1%}) {word}" for key, word in done.items() if counts[key]]
    return "; ".join(parts)


class Layout:
    """What :func:`write_layout` has written."""

    def __init__(self, folder: Path) -> None:
        self.spans, self.samples = _mapped(folder / "spans.bin"), _mapped(folder / "samples.bin")
        self.counts = Counts(**read_json(folder / _META))


def write_layout(folder: Path, examples: ExampleFile, chosen: tuple[int, int], rules: Rules) -> None:
    """Write a new folder for one side.

    Args:
        chosen: the examples whose hash is at least the first number and below the second are of this side.

    Raises:
        NothingLearned: truncation leaves nothing to learn of an example.
    """
    folder.mkdir()
    counts = Counts()
    unpacked = folder / "unpacked.bin"
    with unpacked.open("wb") as file:
        for spans in _spans(examples, chosen, rules, counts):
            file.write(spans.tobytes())
    with (folder / "spans.bin").open("wb") as ordered, (folder / "samples.bin").open("wb") as samples:
        _write_samples(_mapped(unpacked), rules, counts, ordered, samples)
    unpacked.unlink()
    write_json(folder / _META, asdict(counts))


def _spans(examples: ExampleFile, chosen: tuple[int, int], rules: Rules, counts: Counts) -> Iterator[Table]:
    first = 0
    while first < len(examples):
        begin = int(examples.ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(examples.ends, begin + _TOKENS, side="right")))
        ends = np.asarray(examples.ends[first:last])
        starts = np.concatenate(([begin], ends[:-1]))
        learned = np.concatenate(([0], np.cumsum(examples.learned[begin : ends[-1]], dtype=np.int64)))
        hashes = np.asarray(examples.hashes[first:last])
        kept = (hashes >= chosen[0]) & (hashes < chosen[1])
        starts, lengths = _limited(starts[kept], (ends - starts)[kept], rules, counts)
        spans = np.stack((starts, lengths, learned[starts + lengths - begin] - learned[starts + 1 - begin]), axis=1)
        if len(nothing := np.flatnonzero(spans[:, 2] == 0)):
            start = int(spans[nothing[0], 0])
            number = int(np.searchsorted(examples.ends, start, side="right"))
            raise NothingLearned(number, int(examples.ends[number]) - start)
        yield spans
        first = last


def _limited(starts: Table, lengths: Table, rules: Rules, counts: Counts) -> tuple[Table, Table]:
    """Starts and lengths of the spans."""
    limit = rules.sequence_length
    counts.examples += len(lengths)
    counts.longest = max(counts.longest, int(lengths.max(initial=0)))
    long = lengths > limit
    if rules.cut:
        counts.cut += int(long.sum())
        pieces = np.maximum(1, -(-(lengths - 1) // (limit - 1)))
        piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        shift = piece * (limit - 1)
        return np.repeat(starts, pieces) + shift, np.minimum(limit, np.repeat(lengths, pieces) - shift)
    if rules.drop:
        counts.dropped += int(long.sum())
        return starts[~long], lengths[~long]
    counts.truncated += int(long.sum())
    return starts, np.minimum(lengths, limit)


def _write_samples(spans: Table, rules: Rules, counts: Counts, ordered: IO[bytes], samples: IO[bytes]) -> None:
    """Windows of spans drawn at random, so that a file that is sorted does not make samples of one kind."""
    done = 0
    for first in range(0, len(spans), _WINDOW):
        places = np.arange(first, min(first + _WINDOW, len(spans)))
        window = np.asarray(spans[sample_order(places, len(spans), _NO_SEED)] if rules.packing else spans[places])
        sizes = np.ones(len(window), np.int64)
        if rules.packing:
            bins = best_fit_decreasing(window[:, 1].tolist(), rules.sequence_length)
            window, sizes = window[[position for one in bins for position in one]], np.asarray([len(b) for b in bins])
        ordered.write(window.tobytes())
        ends = np.cumsum(sizes)
        sums = np.add.reduceat(window[:, 1:], ends - sizes, axis=0)
        samples.write(np.column_stack((done + ends, sums)).tobytes())
        done += len(window)
        counts.samples += len(sizes)
        counts.tokens += int(sums[:, 0].sum())
        counts.learned += int(sums[:, 1].sum())


def _mapped(path: Path) -> Table:
    if path.stat().st_size == 0:
        return np.zeros((0, 3), np.int64)
    return np.memmap(path, dtype=np.int64, mode="r").reshape(-1, 3)


def holdout_bound(examples: ExampleFile, fraction: float) -> int:
    """The hash below which lies ``fraction`` of the examples, at least one of them; equal ones lie on one side.

    Found by counting, so that no list of all hashes is sorted.
    """
    wanted = max(1, round(fraction * len(examples)))
    shift = np.uint64(48)
    counted = np.zeros(1 << 16, np.int64)
    for first in range(0, len(examples), _WINDOW):
        part = np.asarray(examples.hashes[first : first + _WINDOW]) >> shift
        counted += np.bincount(part.astype(np.int64), minlength=1 << 16)
    bucket = int(np.searchsorted(np.cumsum(counted), wanted))
    inside: list[npt.NDArray[np.uint64]] = []
    for first in range(0, len(examples), _WINDOW):
        part = np.asarray(examples.hashes[first : first + _WINDOW])
        inside.append(part[(part >> shift) == bucket])
    place = wanted - int(counted[:bucket].sum()) - 1
    return int(np.sort(np.concatenate(inside))[place]) + 1
