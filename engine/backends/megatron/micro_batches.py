"""What a forward of Megatron's model is given for a micro-batch, and its loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from ...micro_batch import NOT_LEARNED, Batch, MicroBatch, micro_batch_of
from .layout import Layout, Place
from .sequence_pieces import positions_on


@dataclass(frozen=True)
class Given:
    """A micro-batch of one length with the others of a step.

    Attributes:
        tokens: int64 ``(batch, sequence)``.
        learned: which positions' next tokens are learned, fp32 ``(batch, sequence)``; None for all but the last.
        attention: where examples are packed, what each position attends to, bool ``(batch, 1, sequence, sequence)``;
            None for all before it.
        weight: of the mean loss.
        positions: those of the sequence on this process rank, where several share it, int64; None for all.
    """

    tokens: Tensor
    learned: Tensor | None = None
    attention: Tensor | None = None
    weight: float = 1.0
    positions: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        batch, length = self.tokens.shape
        return batch, length

    def inputs(self) -> dict[str, Any]:
        """A chunk's arguments."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        mask = self.attention
        return {
            "input_ids": self._own(self.tokens),
            "position_ids": self._own(positions),
            "attention_mask": self._own(mask, dim=2) if mask is not None else None,
            "labels": self._own(self.tokens.roll(-1, dims=1)),
        }

    def _own(self, tensor: Tensor, dim: int = 1) -> Tensor:
        return tensor if self.positions is None else tensor.index_select(dim, self.positions)

    def loss(self, losses: Tensor) -> Tensor:
        """The weighted mean of next-token losses ``(batch, sequence)``; the last position has no next token.

        Where process ranks share a sequence, the losses are this rank's, and what the means of all ranks add up to is
        the whole.
        """
        learned = self.learned
        if learned is None and self.positions is None:
            return losses[:, :-1].mean()
        if learned is None:
            learned = torch.ones_like(self.tokens, dtype=losses.dtype)
            learned[:, -1] = 0.0
        return (losses * self._own(learned)).sum() / learned.sum().clamp(min=1.0) * self.weight


def given_of(batches: Sequence[Batch], layout: Layout, place: Place, device: torch.device) -> list[Given]:
    """The micro-batches of a step, or of an evaluation, made as long as the longest of them, and of as many sequences
    as the largest. Collective, over ranks with other data, where these share experts and not all is learned.

    What is added lies behind all tokens, and is not learned. Positions are counted from the start of a sequence,
    also where examples are packed: only their differences matter, and no example attends to another.
    """
    if not any(isinstance(batch, MicroBatch) for batch in batches):
        tokens = [micro_batch_of(batch).tokens.to(device) for batch in batches]
        return [Given(found, positions=positions_at(layout, place, found)) for found in tokens]
    found = [micro_batch_of(batch).to(device) for batch in batches]
    divisor = layout.length_divisor
    most, longest = (max(batch.tokens.shape[dim] for batch in found) for dim in (0, 1))
    if layout.splits_experts:
        most, longest = _over_data_parallel_ranks([most, longest], device)
    larger = [_as_large(batch, most, -(-longest // divisor) * divisor) for batch in found]
    return [_given(batch, positions_at(layout, place, batch.tokens)) for batch in larger]


def positions_at(layout: Layout, place: Place, tokens: Tensor) -> Tensor | None:
    """Those of ``(batch, sequence)`` that a process rank has; None for all."""
    if layout.context == 1:
        return None
    return positions_on(place.context, layout.context, tokens.shape[1]).to(tokens.device)


def _over_data_parallel_ranks(sizes: list[int], device: torch.device) -> list[int]:
    """The largest. Collective."""
    found = torch.tensor(sizes, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return found.tolist()


def _as_large(batch: MicroBatch, num_sequences: int, length: int) -> MicroBatch:
    rows, missing = num_sequences - batch.tokens.shape[0], length - batch.tokens.shape[1]
    if not (rows or missing):
        return batch
    padding, positions = (0, missing, 0, rows), batch.positions
    if positions is not None:
        # Padding is an example of its own, for each sequence.
        size = positions.shape[1]
        positions = F.pad(positions, padding)
        positions[:, size:] = torch.arange(missing, device=positions.device)
        positions[len(positions) - rows :] = torch.arange(length, device=positions.device)
    return replace(
        batch,
        tokens=F.pad(batch.tokens, padding),
        labels=F.pad(batch.labels, padding, value=NOT_LEARNED),
        positions=positions,
    )


def _given(batch: MicroBatch, positions: Tensor | None) -> Given:
    is_learned = F.pad(batch.labels[:, 1:] != NOT_LEARNED, (0, 1))
    attention = None
    if batch.positions is not None:
        example = (batch.positions == 0).cumsum(1)
        attention = (example[:, None, :, None] == example[:, None, None, :]).tril()
    return Given(batch.tokens, is_learned.float(), attention, batch.weight, positions)
