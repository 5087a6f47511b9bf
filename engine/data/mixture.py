"""The samples of one or several sources of examples, in an order that is a function of the seed and the place."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from narrowgauge.optimizers.numerics.seeds import derive_seed

from ..micro_batch import NOT_LEARNED, MicroBatch
from .example_file import ExampleFile
from .layout import Layout
from .order import sample_order

# Lengths of micro-batches are multiples, for the sake of matrix products.
_MULTIPLE = 8
_EVALUATION_SEED = 0
Numbers = npt.NDArray[np.int64]


class SourceSamples:
    """The samples of one source on one side."""

    def __init__(self, name: str, examples: ExampleFile, layout: Layout) -> None:
        self.name, self.layout, self._examples = name, layout, examples

    def __len__(self) -> int:
        return len(self.layout.samples)

    def lengths(self, most: int) -> Numbers:
        """Tokens of each span; of more than ``most`` every second, third or so."""
        spans = self.layout.spans
        return np.asarray(spans[:: -(-len(spans) // most), 1])

    def spans(self, sample: int) -> list[tuple[Numbers, npt.NDArray[np.bool_]]]:
        """Of each example in a sample the tokens, and which of them are learned."""
        first = int(self.layout.samples[sample - 1, 0]) if sample else 0
        found = []
        for start, length, _ in self.layout.spans[first : int(self.layout.samples[sample, 0])].tolist():
            part = slice(start, start + length)
            found.append((self._examples.tokens[part].astype(np.int64), np.array(self._examples.learned[part])))
        return found


class Mixture:
    """Samples of several sources under one numbering.

    Attributes:
        sources: in the order of their numbers.
    """

    def __init__(
        self,
        sources: Sequence[SourceSamples],
        *,
        weights: Sequence[float] | None,
        packing: bool,
        padding_token: int,
        limit: int,
    ) -> None:
        """
        Args:
            limit: tokens of a sample at most.
            weights: the sources' shares of the samples, relative to each other; without them each sample comes once
                per epoch.
        """
        self.sources, self.packing = sources, packing
        self._padding_token, self._limit = padding_token, limit
        self._ends = np.cumsum([len(source) for source in sources])
        self._quotas = _quotas(weights, len(self)) if weights is not None else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def tokens_per_sample(self) -> float:
        """The mean, in the order's shares."""
        counts = [source.layout.counts for source in self.sources]
        if self._quotas is None:
            return sum(one.tokens for one in counts) / len(self)
        shares = zip(self._quotas.tolist(), counts, strict=True)
        return sum(quota * one.tokens / one.samples for quota, one in shares) / len(self)

    def order(self, places: npt.ArrayLike, seed: int) -> Numbers:
        """Which samples stand at places of the endless stream of epochs, each as long as all sources together."""
        found = sample_order(places, len(self), seed)
        if self._quotas is None:
            return found
        ends = np.cumsum(self._quotas)
        epochs = np.asarray(places, dtype=np.int64) // len(self)
        sources = np.searchsorted(ends, found, side="right")
        for number, source in enumerate(self.sources):
            mine = sources == number
            quota = int(self._quotas[number])
            # Of a stream of epochs of its own.
            own = epochs[mine] * quota + found[mine] - (int(ends[number]) - quota)
            own_seed = derive_seed(seed, "source", number)
            found[mine] = sample_order(own, len(source), own_seed) + int(self._ends[number]) - len(source)
        return found

    def learned(self, samples: Numbers) -> Numbers:
        """How many tokens are learned in each sample."""
        return self._column(samples, 2)

    def tokens(self, samples: Numbers) -> Numbers:
        """How many tokens each sample has."""
        return self._column(samples, 1)

    def _column(self, samples: Numbers, column: int) -> Numbers:
        numbers = np.searchsorted(self._ends, samples, side="right")
        found = np.empty(len(samples), np.int64)
        for number in np.unique(numbers):
            source, mine = self.sources[number], numbers == number
            found[mine] = source.layout.samples[samples[mine] - (int(self._ends[number]) - len(source)), column]
        return found

    def number_of_source(self, sample: int) -> int:
        """The place in :attr:`sources` of a sample's."""
        return int(np.searchsorted(self._ends, sample, side="right"))

    def source_of(self, sample: int) -> tuple[SourceSamples, int]:
        """The source of a sample, and its number there."""
        number = self.number_of_source(sample)
        source = self.sources[number]
        return source, sample - (int(self._ends[number]) - len(source))

    def evaluation_batch(self, places: Sequence[int]) -> MicroBatch:
        """As :meth:`micro_batch`, of places in an order that mixes the sources, the same for every run."""
        return self.micro_batch(sample_order(np.asarray(places), len(self), _EVALUATION_SEED).tolist())

    def micro_batch(self, samples: Sequence[int], weight: float = 1.0) -> MicroBatch:
        """The samples side by side, as long as the longest of them."""
        rows = []
        for sample in samples:
            source, number = self.source_of(sample)
            rows.append(source.spans(number))
        longest = max(sum(len(tokens) for tokens, _ in row) for row in rows)
        # The model may have no more positions than the limit.
        shape = len(rows), min(-(-longest // _MULTIPLE) * _MULTIPLE, self._limit)
        tokens = np.full(shape, self._padding_token, np.int64)
        labels = np.full(shape, NOT_LEARNED, np.int64)
        positions, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for number, row in enumerate(rows):
            end = 0
            for example, learned in row:
                begin, end = end, end + len(example)
                tokens[number, begin:end] = example
                labels[number, begin:end] = np.where(learned, example, NOT_LEARNED)
                positions[number, begin:end] = np.arange(len(example))
                if self.packing:
                    # The example before it does not predict it.
                    labels[number, begin] = NOT_LEARNED
            # Padding is an example of its own.
            positions[number, end:] = np.arange(shape[1] - end)
            mask[number, :end] = 1
        as_tensor = torch.from_numpy
        if self.packing:
            return MicroBatch(as_tensor(tokens), as_tensor(labels), positions=as_tensor(positions), weight=weight)
        return MicroBatch(as_tensor(tokens), as_tensor(labels), attention_mask=as_tensor(mask), weight=weight)


def _quotas(weights: Sequence[float], total: int) -> Numbers:
    """Whole numbers in proportion to weights, by the largest remainders; at least 1 each."""
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    found = np.maximum(1, np.floor(exact)).astype(np.int64)
    for number in np.argsort(found - exact, kind="stable"):
        if found.sum() >= total:
            break
        found[number] += 1
    while found.sum() > total:
        found[int(found.argmax())] -= 1
    return found
