"""Facility location: a few examples that stand near to all others."""

import heapq

import torch
from torch import Tensor


def choose(distances: Tensor, budget: int) -> list[int]:
    """The examples that greedily maximise ``sum_i max_{j chosen} (d_max - d_ij)``, in the order of being taken.

    The sum is monotone submodular, so the greedy choice has at least ``1 - 1/e`` of the best one's value (Nemhauser,
    Wolsey and Fisher 1978). An example's gain never grows, so only those whose old gain leads are computed again
    (Minoux 1978, lazy greedy). Of equal gains the first example wins: the same choice on every rank.

    Args:
        distances: ``(n, n)``, symmetric, float64.
        budget: at most ``n``.
    """
    similarity = distances.max() - distances
    covered = torch.zeros(len(similarity), dtype=similarity.dtype, device=similarity.device)
    gains = [(-gain, example, 0) for example, gain in enumerate(similarity.sum(1).tolist())]
    heapq.heapify(gains)
    chosen: list[int] = []
    while len(chosen) < budget:
        _, example, computed_at = heapq.heappop(gains)
        if computed_at == len(chosen):
            chosen.append(example)
            covered = torch.maximum(covered, similarity[example])
        else:
            gain = float((similarity[example] - covered).clamp_(min=0.0).sum())
            heapq.heappush(gains, (-gain, example, len(chosen)))
    return chosen
