"""Packed samples and the loader that feeds a process rank."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DataError
from ..ranks.preemption import ignore_stop_signals
from .order import sample_order
from .workers import WorkerContext


class PackedTokens(Dataset[torch.Tensor]):
    """Streams of tokens cut into samples of equal length; what is left at a stream's end is dropped."""

    def __init__(self, streams: Sequence[tuple[Path, npt.NDArray[Any]]], sequence_length: int, vocab_size: int) -> None:
        """Cut ``(file, tokens)`` streams into samples of ``sequence_length``.

        Args:
            vocab_size: of the model; a larger token in the data is an error when it is met.

        Raises:
            DataError: there is not a single sample.
        """
        self._streams, self._length, self._vocab_size = streams, sequence_length, vocab_size
        self._ends = np.cumsum([len(tokens) // sequence_length for _, tokens in streams])
        if not len(self._ends) or self._ends[-1] == 0:
            found = sum(len(tokens) for _, tokens in streams)
            names = ", ".join(str(path) for path, _ in streams[:3])
            raise DataError(
                f"{names}: expected at least the {sequence_length} tokens of one data.sequence_length, got {found}"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, sample: int) -> torch.Tensor:
        stream = int(np.searchsorted(self._ends, sample, side="right"))
        within = sample - (int(self._ends[stream - 1]) if stream else 0)
        path, tokens = self._streams[stream]
        chunk = tokens[within * self._length : (within + 1) * self._length].astype(np.int64)
        if chunk.max() >= self._vocab_size or chunk.min() < 0:
            raise DataError(
                f"{path}: expected tokens below the model's vocab_size, {self._vocab_size}, got {chunk.max()}"
            )
        return torch.from_numpy(chunk)


class RankSampler(Sampler[list[int]]):
    """The samples of one process rank, micro-batch by micro-batch.

    A step takes the next ``train_batch_size`` places of the global order, whatever the number of ranks, so a run can
    be continued at any step on any of them.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        seed: int,
        first_step: int,
        last_step: int,
        micro_batch_size: int,
        accumulation_steps: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._num_samples, self._seed = num_samples, seed
        self._steps = range(first_step, last_step)
        self._micro_batch_size, self._accumulation_steps = micro_batch_size, accumulation_steps
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return len(self._steps) * self._accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        size = self._micro_batch_size
        for step in self._steps:
            for micro_batch in range(self._accumulation_steps):
                first = ((step * self._accumulation_steps + micro_batch) * self._world_size + self._rank) * size
                yield sample_order(np.arange(first, first + size), self._num_samples, self._seed).tolist()


def training_loader(dataset: PackedTokens, sampler: RankSampler, num_workers: int) -> DataLoader[torch.Tensor]:
    """A loader that reads ahead in worker processes, so that training does not wait for it."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        multiprocessing_context=WorkerContext() if num_workers else None,
        prefetch_factor=8 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
    )
