"""The micro-batches of one process rank, read ahead in worker processes."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..micro_batch import Batch
from ..ranks.preemption import ignore_stop_signals
from .mixture import Mixture
from .packed import PackedTokens
from .workers import WorkerContext

Numbers = npt.NDArray[np.int64]
Samples = PackedTokens | Mixture


class RankSampler(Sampler[list[int]]):
    """The samples of one process rank, micro-batch by micro-batch.

    A step takes the next ``train_batch_size`` places of the global order, whatever the number of ranks, so a run can
    be continued at any step on any of them.
    """

    def __init__(
        self,
        order: Callable[[Numbers], Numbers],
        *,
        first_step: int,
        last_step: int,
        micro_batch_size: int,
        accumulation_steps: int,
        rank: int,
        world_size: int,
    ) -> None:
        """
        Args:
            order: which samples stand at places of the stream.
        """
        self._order, self._steps = order, range(first_step, last_step)
        self._shape = accumulation_steps, world_size, micro_batch_size
        self._rank = rank

    def __len__(self) -> int:
        return len(self._steps) * self._shape[0]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            yield from step[:, self._rank].tolist()

    def steps(self) -> Iterator[Numbers]:
        """The samples of each step, ``(accumulation steps, process ranks, micro-batch)``."""
        size = int(np.prod(self._shape))
        for step in self._steps:
            yield self._order(np.arange(step * size, (step + 1) * size)).reshape(self._shape)

    def weighted(self, learned: Callable[[Numbers], Numbers]) -> Iterator[tuple[list[int], float]]:
        """As iterating, each with :attr:`.MicroBatch.weight`.

        Args:
            learned: how many tokens are learned in each sample.
        """
        num_micro_batches = self._shape[0] * self._shape[1]
        for step in self.steps():
            counts = learned(step.reshape(-1)).reshape(self._shape).sum(axis=2)
            weights = counts[:, self._rank] * (num_micro_batches / counts.sum())
            yield from zip(step[:, self._rank].tolist(), weights.tolist(), strict=True)


class _Weighted(Sampler[tuple[list[int], float]]):
    def __init__(self, sampler: RankSampler, learned: Callable[[Numbers], Numbers]) -> None:
        self._sampler, self._learned = sampler, learned

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[tuple[list[int], float]]:
        return self._sampler.weighted(self._learned)


class _MicroBatches(Dataset[Batch]):
    """Micro-batches by the numbers of their samples and their weight."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def __getitem__(self, wanted: tuple[list[int], float]) -> Batch:
        return self._mixture.micro_batch(*wanted)


def training_loader(samples: Samples, sampler: RankSampler, num_workers: int) -> DataLoader[Batch]:
    """A loader that reads ahead in worker processes, so that training does not wait for it."""
    options: Any = {
        "num_workers": num_workers,
        "multiprocessing_context": WorkerContext() if num_workers else None,
        "prefetch_factor": 8 if num_workers else None,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": ignore_stop_signals,
        # An iterator draws a seed when it begins, in the first step after a start: not from the model's generator.
        "generator": torch.Generator(),
    }
    if isinstance(samples, Mixture):
        # What is drawn is a micro-batch already.
        options |= {"sampler": _Weighted(sampler, samples.learned), "batch_size": None, "collate_fn": _as_it_is}
        return DataLoader(_MicroBatches(samples), **options)
    tokens: Any = samples
    return DataLoader(tokens, batch_sampler=sampler, **options)


def _as_it_is(batch: Batch) -> Batch:
    return batch
