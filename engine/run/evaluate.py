"""Validation loss over a fixed set of samples, the same on any number of process ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..data.packed import PackedTokens


@torch.no_grad()
def evaluate(
    engine: Any,
    dataset: PackedTokens,
    *,
    num_sequences: int,
    micro_batch_size: int,
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss over the first ``num_sequences`` samples of ``dataset`` (all of it if it has fewer). Collective.

    Every rank runs the same number of batches, as ZeRO-3's gathers require; places beyond the last sample weigh
    nothing. ``beat`` is called before each batch.
    """
    rank, world_size, device = dist.get_rank(), dist.get_world_size(), engine.device
    num_sequences = min(num_sequences, len(dataset))
    total = torch.zeros(2, dtype=torch.float64, device=device)
    engine.eval()
    for first in range(0, num_sequences, micro_batch_size * world_size):
        places = range(first + rank * micro_batch_size, first + (rank + 1) * micro_batch_size)
        beat()
        counted = [place for place in places if place < num_sequences]
        batch = torch.stack([dataset[place] for place in counted or [0]]).to(device)
        loss = engine(input_ids=batch, labels=batch).loss
        total += torch.tensor([float(loss) * len(counted), len(counted)], dtype=torch.float64, device=device)
    engine.train()
    dist.all_reduce(total)
    return float(total[0] / total[1])
