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
from .layout import Layout


@dataclass(frozen=True)
class Given:
    """A micro-batch of one length with the others of a step.

    Attributes:
        tokens: int64 ``(batch, sequence)``.
        learned: which positions' next tokens are learned, fp32 ``(batch, sequence)``; None for all but the last.
        attention: where examples are packed, what each position attends to, bool ``(batch, 1, sequence, sequence)``;
            None for all before it.
        weight: of the mean loss.
    """

    tokens: Tensor
    learned: Tensor | None = None
    attention: Tensor | None = None
    weight: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        batch, length = self.tokens.shape
        return batch, length

    def inputs(self) -> dict[str, Any]:
        """A chunk's arguments."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        return {
            "input_ids": self.tokens,
            "position_ids": positions,
            "attention_mask": self.attention,
            "labels": self.tokens.roll(-1, dims=1),
        }

    def loss(self, losses: Tensor) -> Tensor:
        """The weighted mean of next-token losses ``(batch, sequence)``; the last position has no next token."""
        if self.learned is None:
            return losses[:, :-1].mean()
        return (losses * self.learned).sum() / self.learned.sum().clamp(min=1.0) * self.weight


def given_of(batches: Sequence[Batch], layout: Layout, device: torch.device) -> list[Given]:
    """The micro-batches of a step, or of an evaluation, made as long as the longest of them, and of as many sequences
    as the largest. Collective, over ranks with other data, where these share experts and not all is learned.

    What is added lies behind all tokens, and is not learned. Positions are counted from the start of a sequence,
    also where examples are packed: only their differences matter, and no example attends to another.
    """
    if not any(isinstance(batch, MicroBatch) for batch in batches):
        return [Given(micro_batch_of(batch).tokens.to(device)) for batch in batches]
    found = [micro_batch_of(batch).to(device) for batch in batches]
    shares = layout.tensor if layout.sequence_parallel else 1
    most, longest = (max(batch.tokens.shape[dim] for batch in found) for dim in (0, 1))
    if layout.splits_experts:
        most, longest = _over_data_parallel_ranks([most, longest], device)
    return [_given(_as_large(batch, most, -(-longest // shares) * shares)) for batch in found]


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


def _given(batch: MicroBatch) -> Given:
    is_learned = F.pad(batch.labels[:, 1:] != NOT_LEARNED, (0, 1))
    attention = None
    if batch.positions is not None:
        example = (batch.positions == 0).cumsum(1)
        attention = (example[:, None, :, None] == example[:, None, None, :]).tril()
    return Given(batch.tokens, is_learned.float(), attention, batch.weight)
