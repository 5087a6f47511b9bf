"""What a run was told to take, beside what it took."""

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import first_line
from ..forecast.forecast import forecast
from ..forecast.hardware import gpu_named
from ..forecast.machine import Machine
from ..ranks.environment import world_size
from .plan import Plan

# Steps in which the allocator is watched: memory is the same in all of them, but for a change of subspace.
WATCHED_STEPS = 10


@dataclass(frozen=True)
class Foretold:
    """A run's forecast, or why there is none.

    Attributes:
        values: bytes, by what is measured too.
        reason: in the latter case.
    """

    values: dict[str, float]
    reason: str = ""

    def beside(self, measured: dict[str, float | None]) -> dict[str, Any]:
        """For the summary; null is what was not measured."""
        if self.reason:
            return {"unavailable": self.reason}
        return {key: {"predicted": round(value), "measured": measured[key]} for key, value in self.values.items()}


def foretell(plan: Plan) -> Foretold:
    """The forecast of a run that is about to begin; before there is a process group."""
    machine = Machine(nodes=1, gpus=world_size(), gpu=gpu_named("h100-80")) if torch.cuda.is_available() else None
    try:
        found = forecast(plan.config, plan.model_config, world_size=world_size(), machine=machine, steps=plan.steps)
        sent, peak = found.ranks[0][1], found.peak.total
    except Exception as error:
        # Nothing of the run rests on it: whatever a model does that cannot be told ahead, it is trained.
        return Foretold({}, f"{type(error).__name__}: {first_line(error)}")
    values = {"peak_tensor_memory": peak, "reduced_per_step": sent.reduced, "gathered_per_step": sent.gathered}
    if plan.config.parsed.engine == "megatron":
        values["activations_per_step"] = sent.activations
    return Foretold(values)
