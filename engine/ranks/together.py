"""One action on every rank, which succeeds on all of them or raises on all of them."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ..errors import CheckpointError

T = TypeVar("T")


def together(what: str, action: Callable[[], T], failure: str | None = None) -> T:
    """Run ``action`` on every rank; if it fails on any, raise on all, so that none waits for one that has left.

    Args:
        what: is done to a checkpoint: ``save`` or ``load``.
        failure: this rank's reason not to begin.

    Raises:
        CheckpointError: naming the process ranks that failed, and why; the same on every rank.
    """
    results: list[T] = []
    if failure is None:
        try:
            results.append(action())
        except Exception as error:
            failure = str(error) or type(error).__name__
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    met = [f"process rank {rank}: {text}" for rank, text in enumerate(failures) if text is not None]
    if met:
        raise CheckpointError(f"checkpoint {what} failed; " + "; ".join(met)).shared()
    return results[0]
