"""How much of what its devices can do a run uses, on process rank 0."""

import logging
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ..protocol import TrainingEngine
from ..ranks.environment import world_size
from ..report.flops import flops_per_token, peak_of
from .model import abstract_model
from .plan import Plan

logger = logging.getLogger(__name__)


class Utilization:
    """Model FLOPs utilization; see :mod:`narrowgauge.engine.report.flops`."""

    def __init__(self, engine: TrainingEngine, plan: Plan) -> None:
        """Count what the model needs, find what the device can do, and say which figure is taken."""
        self._needed = flops_per_token(
            abstract_model(plan.model_config),
            plan.model_config,
            engine.parameter_counts(),
            plan.data.sequence_length,
        )
        fp16 = getattr(plan.config.parsed, "fp16", None)
        is_half = plan.config.bf16 or bool(fp16 is not None and fp16.enabled)
        self._peak = peak_of(engine.device, torch.bfloat16 if is_half else torch.float32)
        said = "not shown: the model does not say how many of its experts a token goes through"
        logger.info(f"MFU: {f'of {self._peak.source}' if self._needed is not None else said}")

    def of(self, tokens_per_second: float) -> float | None:
        """The share; None where it is not known what the model needs."""
        return self._needed * tokens_per_second / (self._peak.flops * world_size()) if self._needed else None

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """``mfu`` of a summary: the median step's, and what it is counted with."""
        shares = [record["mfu"] for record in records if isinstance(record.get("mfu"), float)]
        if not shares or self._needed is None:
            return {}
        return {
            "mfu": {
                "median": statistics.median(shares),
                "flops_per_token": self._needed,
                "peak_flops": self._peak.flops,
                "peak_source": self._peak.source,
            }
        }
