"""Which backends a machine has, and which of them is the fastest on a path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from . import aio, gds
from .base import IOBackend
from .probe import Speed, measure
from .threads import ThreadsBackend

BackendName = Literal["auto", "threads", "aio", "gds"]
# Another backend has to be this much faster than threads; and more so where it needs a copy that threads do not need,
# for which compute waits.
_CLEARLY_FASTER, _WORTH_A_COPY = 1.1, 1.5
_ROUNDS = 3


def available_backends() -> tuple[list[IOBackend], dict[str, str]]:
    """The backends that work here, and of the others the reason why not."""
    found: list[IOBackend] = [ThreadsBackend()]
    missing: dict[str, str] = {}
    for name in ("aio", "gds"):
        try:
            reason = _missing_aio() if name == "aio" else gds.unavailable_because()
            if reason is None:
                found.append(_make(name))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            missing[name] = reason
    return found, missing


def _missing_aio() -> str | None:
    if aio.is_built():
        return None
    if not aio.can_build():
        return "libaio and its header are not installed (apt-get install libaio-dev)"
    return "not compiled (narrowgauge build --aio)"


def _make(name: str) -> IOBackend:
    return {"threads": ThreadsBackend, "aio": aio.AioBackend, "gds": gds.GdsBackend}[name]()


def make_backend(name: str, folder: Path, device: torch.device, *, timeout: float = 300.0) -> tuple[IOBackend, Speed]:
    """The backend of that name, or with ``auto`` the fastest for tensors of ``device``, and its measured speed.

    Raises:
        OffloadError: it is not there, or the disk does not answer within ``timeout`` seconds.
        OSError, ImportError, RuntimeError: the backend does not work here.
    """
    candidates: Sequence[IOBackend] = available_backends()[0] if name == "auto" else [_make(name)]
    copies = [device.type == "cpu" and not backend.writes_in_place for backend in candidates]
    speeds: list[list[Speed]] = [[] for _ in candidates]
    # One alone needs no comparison; among several, the best of some rounds is the least disturbed by others.
    for _ in range(_ROUNDS if len(candidates) > 1 else 1):
        for backend, copied, found in zip(candidates, copies, speeds, strict=True):
            found.append(measure(backend, folder, staged=copied, timeout=timeout))
    best = [max(found, key=lambda speed: speed.both) for found in speeds]
    needed = [1.0, *(_WORTH_A_COPY if copied else _CLEARLY_FASTER for copied in copies[1:])]
    chosen = max(range(len(best)), key=lambda number: best[number].both / needed[number])
    return candidates[chosen], best[chosen]
