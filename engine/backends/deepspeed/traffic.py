"""Bytes a process rank sends for reductions and gathers: counted on DeepSpeed's collectives, and computed for dense
AdamW.

A collective over N ranks on S bytes makes each rank send, by the ring algorithms of NCCL and gloo: all-reduce ``2
(N-1)/N S``, reduce-scatter (S in) and all-gather (S out) ``(N-1)/N S``; a reduce to one rank ``(N-1)/N S`` on
average. gloo has no reduce-scatter of its own: it runs an all-reduce, at twice the bytes.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import deepspeed.comm.comm as deepspeed_comm
import torch.distributed
from torch import Tensor


class TrafficCounter:
    """Counts what goes through ``deepspeed.comm`` while attached.

    Attributes:
        reduced: bytes this rank sent in reductions.
        gathered: bytes this rank sent in gathers.
    """

    def __init__(self) -> None:
        self.reduced = self.gathered = 0.0
        self._wrapped: list[str] = []

    def attach(self) -> None:
        """Start counting; DeepSpeed's communication must have been initialised."""
        for name, (position, keyword, factor) in _COLLECTIVES.items():
            self._wrap(name, position, keyword, factor)

    def detach(self) -> None:
        for name in self._wrapped:
            delattr(deepspeed_comm.cdb, name)
        self._wrapped = []

    def _wrap(self, name: str, position: int, keyword: str, factor: float) -> None:
        backend: Any = deepspeed_comm.cdb
        original: Callable[..., Any] = getattr(backend, name)
        reduces = "reduce" in name

        @wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            payload = kwargs[keyword] if keyword in kwargs else args[position]
            group = kwargs.get("group") or next((a for a in args if _is_group(a)), None)
            size = backend.get_world_size(group)
            rings = reduce_scatter_factor() if name.startswith("reduce_scatter") else factor
            sent = rings * (size - 1) / size * _num_bytes(payload)
            if reduces:
                self.reduced += sent
            else:
                self.gathered += sent
            return original(*args, **kwargs)

        setattr(backend, name, counted)
        self._wrapped.append(name)


# method of DeepSpeed's backend: position and name of the argument that holds the whole payload, and the ring's factor
_COLLECTIVES: dict[str, tuple[int, str, float]] = {
    "all_reduce": (0, "tensor", 2.0),
    "all_reduce_coalesced": (0, "tensors", 2.0),
    "reduce": (0, "tensor", 1.0),
    "reduce_scatter_tensor": (1, "input_tensor", 1.0),
    "reduce_scatter": (1, "input_list", 1.0),
    "all_gather_into_tensor": (0, "output_tensor", 1.0),
    "all_gather": (0, "tensor_list", 1.0),
    "all_gather_coalesced": (0, "output_tensors", 1.0),
}


def reduce_scatter_factor() -> float:
    """What a reduce-scatter costs, in units of ``(N-1)/N S``, on the process group's backend."""
    return 2.0 if torch.distributed.get_backend() == "gloo" else 1.0


def _is_group(value: Any) -> bool:
    return type(value).__name__ == "ProcessGroup"


def _num_bytes(payload: Tensor | Iterable[Tensor]) -> int:
    if isinstance(payload, Tensor):
        return payload.numel() * payload.element_size()
    return sum(map(_num_bytes, payload))


def dense_traffic(*, stage: int, parameter_bytes: int, world_size: int, accumulation_steps: int) -> tuple[float, float]:
    """Bytes reduced and gathered per step and rank when all of the model's parameters are trained, ZeRO stages 0 to 2.

    DeepSpeed all-reduces gradient buckets: once per step at stages 0 and 1, once per micro-batch at stage 2. Stages 1
    and 2 gather the updated parameters once per step.
    """
    share = (world_size - 1) / world_size
    reductions = accumulation_steps if stage == 2 else 1
    return 2 * reductions * share * parameter_bytes, (share * parameter_bytes if stage else 0.0)


def dense_traffic_zero3(
    *,
    gathered: float,
    current: Iterable[tuple[int, bool]],
    dense: Iterable[tuple[int, bool]],
    trainable_bytes: int,
    world_size: int,
    accumulation_steps: int,
) -> tuple[float, float]:
    """The same for ZeRO-3, derived from what the current run gathers.

    Gradients are reduce-scattered per micro-batch. A persistent parameter is gathered once per step, any other as often
    as forward and backward ask for it, which is the same in both runs and follows from the bytes counted.

    Args:
        gathered: bytes gathered per step and rank by the current run.
        current, dense: ``(bytes, persistent)`` of each parameter of the current and of the dense model.
        trainable_bytes: of the dense model.
    """
    share = (world_size - 1) / world_size

    def split(parameters: Iterable[tuple[int, bool]]) -> tuple[int, int]:
        parameters = list(parameters)
        return sum(b for b, kept in parameters if kept), sum(b for b, kept in parameters if not kept)

    persistent, others = split(current)
    times = (gathered / share - persistent) / others if share and others else 0.0
    dense_persistent, dense_others = split(dense)
    reduced = reduce_scatter_factor() * accumulation_steps * share * trainable_bytes
    return reduced, share * (dense_persistent + times * dense_others)
