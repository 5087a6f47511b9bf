"""What each process rank's forwards leave for the next ones: the ranges and random numbers of a codec."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ..protocol import TrainingEngine

SAVED_BY_FORWARDS = "forwards"


def gather_state(engine: TrainingEngine) -> list[dict[str, Any]]:
    """Each process rank's, in rank order; empty without a codec. Collective."""
    offload = engine.activation_offload
    if offload is None or offload.codec == "none":
        return []  # on all ranks
    own: dict[str, Any] = {}
    if codec := offload.state_dict():
        own["codec"] = {**codec, "places": {place: ranges.cpu() for place, ranges in codec["places"].items()}}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def restore_state(engine: TrainingEngine, found: Sequence[dict[str, Any]]) -> None:
    """Take this process rank's; on another number of ranks that of some rank, as all ranks' data are alike."""
    own = found[dist.get_rank() % len(found)]
    if engine.activation_offload is not None:
        engine.activation_offload.load_state_dict(own.get("codec", {}))
