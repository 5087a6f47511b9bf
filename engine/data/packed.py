"""Samples cut from streams of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ..errors import DataError
from .order import sample_order


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

    @property
    def tokens_per_sample(self) -> float:
        return float(self._length)

    def order(self, places: npt.ArrayLike, seed: int) -> npt.NDArray[np.int64]:
        """See :func:`.sample_order`."""
        return sample_order(places, len(self), seed)

    def micro_batch(self, samples: Sequence[int]) -> torch.Tensor:
        """Int64 tokens ``(samples, sequence length)``."""
        return torch.stack([self[sample] for sample in samples])

    def evaluation_batch(self, places: Sequence[int]) -> torch.Tensor:
        """As :meth:`micro_batch`, of the samples in their order in the streams."""
        return self.micro_batch(places)

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
