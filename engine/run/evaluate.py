"""Validation loss over a fixed set of samples, the same on any number of process ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from ..data.packed import PackedTokens
from ..protocol import TrainingEngine


def evaluate(
    engine: TrainingEngine,
    dataset: PackedTokens,
    *,
    num_sequences: int,
    micro_batch_size: int,
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss over the first ``num_sequences`` samples of ``dataset`` (all of it if it has fewer). Collective.

    Every rank runs the same number of batches, as engines that gather weights in forward require; places beyond the
    last sample weigh nothing. ``beat`` is called before each batch.
    """
    ranks, device = engine.data_parallel, engine.device
    num_sequences = min(num_sequences, len(dataset))
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, num_sequences, micro_batch_size * ranks.size):
        places = range(first + ranks.rank * micro_batch_size, first + (ranks.rank + 1) * micro_batch_size)
        beat()
        counted = [place for place in places if place < num_sequences]
        loss = engine.evaluate(torch.stack([dataset[place] for place in counted or [0]]))
        total += torch.tensor([float(loss) * len(counted), len(counted)], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=ranks.group)
    return float(total[0] / total[1])
