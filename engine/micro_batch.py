"""What a forward of one process rank is given: tokens alone, or tokens of which some are learned."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NOT_LEARNED = -100


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of different lengths, padded on the right.

    Attributes:
        tokens: int64 ``(sequences, length)``.
        labels: the same, and ``NOT_LEARNED`` where nothing is; not shifted.
        attention_mask: int64, 0 for padding, where each sequence is one example; None where several are packed.
        positions: int64, from 0 in each of the packed examples; else None.
        weight: of the mean loss over the learned tokens, so that the mean of all micro-batches of a step, over all
            ranks, is the mean over the learned tokens of the step.
    """

    tokens: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    weight: float = 1.0

    @property
    def num_learned(self) -> int:
        """Tokens that are predicted; the first of a sequence is not."""
        return int((self.labels[:, 1:] != NOT_LEARNED).sum())

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of a model of transformers."""
        given = {
            "input_ids": self.tokens,
            "labels": self.labels,
            "attention_mask": self.attention_mask,
            "position_ids": self.positions,
        }
        return {name: value for name, value in given.items() if value is not None}

    def to(self, device: torch.device) -> "MicroBatch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """Called by a DataLoader."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, function: Any) -> "MicroBatch":
        names = ("tokens", "labels", "attention_mask", "positions")
        changed = {name: function(value) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **changed)


Batch = Tensor | MicroBatch
"""Int64 tokens ``(sequences, length)``, all of them learned, or a micro-batch that says which are."""


def micro_batch_of(batch: Batch) -> MicroBatch:
    """Tokens as a micro-batch."""
    return batch if isinstance(batch, MicroBatch) else MicroBatch(batch, batch)
