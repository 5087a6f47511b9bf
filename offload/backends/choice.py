"""Which backends a machine has, and which of them is the fastest on a path."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import OffloadError
from .base import IOBackend
from .probe import Speed, measure
from .registry import AUTO, BACKENDS
from .threads import ThreadsBackend

# Another backend has to be this much faster than threads; and more so where it needs a copy that threads do not need,
# for which compute waits.
_CLEARLY_FASTER, _WORTH_A_COPY = 1.1, 1.5
_ROUNDS = 3
_log = logging.getLogger(__name__)


def available_backends() -> tuple[list[IOBackend], dict[str, str]]:
    """The backends that work here, threads first, and of the others the reason why not."""
    found: list[IOBackend] = []
    missing: dict[str, str] = {}
    for name in sorted(BACKENDS, key=lambda name: (name != ThreadsBackend.name, name)):
        try:
            reason = BACKENDS[name].unavailable_because()
            if reason is None:
                found.append(BACKENDS[name]())
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            missing[name] = reason
    return found, missing


def make_backend(name: str, folder: Path, device: torch.device, *, timeout: float = 300.0) -> tuple[IOBackend, Speed]:
    """The backend of that name, or with ``auto`` the fastest for tensors of ``device``, and its measured speed.

    Raises:
        OffloadError: it is unavailable, or the disk does not answer within ``timeout`` seconds.
        OSError, ImportError, RuntimeError: the backend does not work here.
    """
    candidates: Sequence[IOBackend] = available_backends()[0] if name == AUTO else [BACKENDS[name]()]
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


def choose_backend(backend: str | IOBackend, folders: Sequence[Path], *, timeout: float) -> tuple[IOBackend, Speed]:
    """The backend of that name, or that object, and its speed over all folders together.

    Raises:
        OffloadError: it cannot be used here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if isinstance(backend, str):
            chosen, speed = make_backend(backend, folders[0], device, timeout=timeout)
        else:
            chosen, speed = backend, measure(backend, folders[0], timeout=timeout)
    except (OSError, ImportError, RuntimeError) as error:
        if isinstance(error, OffloadError):
            raise
        raise OffloadError(f"backend: {backend} cannot be used on {folders[0]}: {error}") from error
    _log.info("I/O backend %s: %.2f GB/s write, %.2f GB/s read", chosen.name, speed.write / 1e9, speed.read / 1e9)
    return chosen, Speed(speed.write * len(folders), speed.read * len(folders))
