"""Bytes a process rank sends for reductions and gathers, counted on DeepSpeed's collectives."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import deepspeed.comm.comm as deepspeed_comm
from torch import Tensor

from ...report.dense_traffic import reduce_scatter_factor
from ...report.phases import named


class TrafficCounter:
    """Counts what goes through ``deepspeed.comm`` while attached.

    Attributes:
        reduced: bytes this rank sent in reductions.
        gathered: bytes this rank sent in gathers.
        activations: None: they are not counted.
    """

    def __init__(self) -> None:
        self.reduced = self.gathered = 0.0
        self.activations: float | None = None
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
            # Of an exchange all is sent to others.
            share = 1.0 if name == _EXCHANGE else (size - 1) / size
            sent = rings * share * _num_bytes(payload)
            if reduces:
                self.reduced += sent
            else:
                self.gathered += sent
            with named("reduce" if reduces else "gather"):
                return original(*args, **kwargs)

        setattr(backend, name, counted)
        self._wrapped.append(name)


_EXCHANGE = "all_to_all_single"
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
    _EXCHANGE: (1, "input", 1.0),
}


def _is_group(value: Any) -> bool:
    return type(value).__name__ == "ProcessGroup"


def _num_bytes(payload: Tensor | Iterable[Tensor]) -> int:
    if isinstance(payload, Tensor):
        return payload.numel() * payload.element_size()
    return sum(map(_num_bytes, payload))
