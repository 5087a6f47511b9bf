"""How evenly a model's experts are used: what its routers count, over all process ranks."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .model import StagedModel
from .router import CountingRouter


def needs_counts_ahead(routers: Iterable[CountingRouter], accumulation_steps: int) -> bool:
    """Whether a step begins with forwards that only count. Its one micro-batch would tell in its own forward."""
    return accumulation_steps > 1 and any(router.has_global_balance for router in routers)


class Balance:
    """What the routers of a model count in a step; nothing for a model without experts.

    Args:
        model: this process rank's part.
        accumulation_steps: micro-batches of a step.
    """

    def __init__(self, model: StagedModel, accumulation_steps: int) -> None:
        self._model, self._routers = model, model.routers
        self.needs_counts_ahead = needs_counts_ahead(self._routers.values(), accumulation_steps)
        self._found: dict[str, Any] = {}

    def begin_step(self) -> None:
        for router in self._routers.values():
            router.begin_step()

    @contextmanager
    def counting_ahead(self) -> Iterator[None]:
        """Forwards inside tell what the step's micro-batches will choose. Collective."""
        routers = list(self._routers.values())
        for router in routers:
            router.is_counting_ahead = True
        try:
            yield
        finally:
            for router in routers:
                router.is_counting_ahead = False
        counts = torch.stack([torch.as_tensor(router.ahead) for router in routers])
        dist.all_reduce(counts, group=routers[0].ranks_of_batch)
        for router, own in zip(routers, counts, strict=True):
            router.frequencies = (own / own.sum()).float()

    def end_step(self) -> None:
        """Put together what all process ranks have counted. Collective."""
        num_experts = self._model.architecture.num_experts
        if not num_experts:
            return
        # By layer: choices and probabilities by expert, and how many were kept; of ranks that have not the layer, zero.
        device = next(self._model.parameters()).device
        found = torch.zeros(
            self._model.architecture.num_layers, 2 * num_experts + 1, dtype=torch.float64, device=device
        )
        for layer, router in self._routers.items():
            parts = (router.chosen, router.probability, torch.as_tensor(router.kept)[None])
            found[layer] = torch.cat([torch.as_tensor(part).double() for part in parts])
        dist.all_reduce(found)
        chosen, probability, kept = found.split([num_experts, num_experts, 1], dim=1)
        frequencies = chosen / chosen.sum(1, keepdim=True)
        shares = probability / probability.sum(1, keepdim=True)
        losses = num_experts * (frequencies * shares).sum(1)
        loads = num_experts * frequencies.max(1).values
        self._found = {
            "balance_loss": float(losses.mean()),
            "max_load": {str(layer): load for layer, load in enumerate(loads.tolist())},
            "dropped": 1.0 - float(kept.sum() / chosen.sum()),
        }

    def metrics(self) -> Mapping[str, Any]:
        """Of the last step, over all process ranks; the same on each.

        Returns:
            ``experts``: ``balance_loss``, the mean over the layers of ``E sum_e f_e P_e`` of the whole batch, 1 where
            all experts are chosen equally often (see :class:`.router.CountingRouter`); ``max_load``, of each layer the
            most chosen expert's choices over the experts' mean; ``dropped``, the share of all choices. Empty without
            experts.
        """
        return {"experts": self._found} if self._found else {}
