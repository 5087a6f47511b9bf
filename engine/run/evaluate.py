"""Validation loss over a fixed set of samples, the same on any number of process ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from ..data.loader import Samples
from ..micro_batch import micro_batch_of
from ..protocol import TrainingEngine


def evaluate(
    engine: TrainingEngine,
    samples: Samples,
    *,
    num_sequences: int,
    micro_batch_size: int,
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss over the learned tokens of the first ``num_sequences`` samples (all if there are fewer). Collective.

    Every rank runs the same number of batches, as engines that gather weights in forward require; places beyond the
    last sample weigh nothing. ``beat`` is called before each batch.
    """
    ranks, device = engine.data_parallel, engine.device
    num_sequences = min(num_sequences, len(samples))
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, num_sequences, micro_batch_size * ranks.size):
        places = range(first + ranks.rank * micro_batch_size, first + (ranks.rank + 1) * micro_batch_size)
        beat()
        counted = [place for place in places if place < num_sequences]
        batch = samples.evaluation_batch(counted or [0])
        loss = engine.evaluate(batch)
        num_learned = micro_batch_of(batch).num_learned if counted else 0
        total += torch.tensor([float(loss) * num_learned, num_learned], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=ranks.group)
    return float(total[0] / total[1])
