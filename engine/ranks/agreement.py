"""Agreement between process ranks before there is a process group.

Each rank posts its configuration, or the error it met, on the rendezvous store and reads everybody's. So a rank that
cannot start takes the others with it, with its own message, instead of leaving them in a collective.
"""

import json
import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.rendezvous import rendezvous

from ..config.json_file import flatten
from ..errors import UserError
from .attempt import may_restart, store_of_attempt
from .environment import process_rank, world_size
from .versions import installed_versions

_REPORT_TIMEOUT = timedelta(minutes=30)
_meetings = 0
# Rank 0 may host the store's server: other ranks go on to make a process group on the same address and would meet a
# server that is just closing, were it not kept.
_store: Any = None


def make_process_group(backend: str, timeout: timedelta) -> None:
    """Make the group, on a part of the store of its own, where the ranks have met and there is none; else others do.

    Torch names a group as the one before it that was destroyed. On the same part of the store, as in a second run of
    the same processes or after torchrun's restart, a rank would look for others at the addresses that they had then.
    """
    if _store is not None and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend,
            store=PrefixStore(f"narrowgauge/group/{_meetings}", _store),
            rank=process_rank(),
            world_size=world_size(),
            timeout=timeout,
        )


def num_meetings() -> int:
    """How often the ranks have met; the same on all of them between two meetings."""
    return _meetings


def agreed_store() -> Any:
    """The store that the ranks have met on; None where they have not."""
    return _store


def store_of_group() -> Any:
    """On which the ranks of the default process group have met."""
    return _get_default_store()


def agree(settings: dict[str, Any], *, error: str | None = None, choice: str | None = None) -> str | None:
    """Meet all ranks and compare what they are about to do.

    Args:
        settings: nested, JSON-like; must be equal on all ranks. Package versions and the number of ranks per host are
            compared besides.
        error: this rank's reason not to start.
        choice: what rank 0 would have all ranks take.

    Returns:
        Rank 0's choice.

    Raises:
        UserError: some rank reported an error, did not report in time, or differs; the same on every rank.
    """
    if world_size() == 1:
        if error is not None:
            raise UserError(error)
        return choice
    global _meetings, _store
    _meetings += 1
    if torch.distributed.is_initialized():
        _store, rank, size = store_of_group(), torch.distributed.get_rank(), torch.distributed.get_world_size()
    elif _store is None:
        found, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=5)))
        _store = store_of_attempt(found, rank, size, _REPORT_TIMEOUT) if may_restart() else found
    else:
        rank, size = process_rank(), world_size()
    # Of the meetings on this store: a process may have been in other groups before, with other ranks.
    number = _store.add(f"narrowgauge/meetings/{rank}", 1)
    store = PrefixStore(f"narrowgauge/{number}", _store)
    versions = {f"version of {name}": found for name, found in installed_versions().items()}
    local = {"process ranks on this host": os.environ.get("LOCAL_WORLD_SIZE", "a number not given")}
    report = {
        "error": error,
        "choice": choice,
        "host": socket.gethostname(),
        "settings": {**flatten(settings), **versions, **local},
    }
    store.set(str(rank), json.dumps(report))
    reports = []
    for other in range(size):
        try:
            store.wait([str(other)], _REPORT_TIMEOUT)
        except torch.distributed.DistStoreError as late:
            raise UserError(f"process rank {other} did not report within {_REPORT_TIMEOUT}") from late
        reports.append(json.loads(store.get(str(other))))
    _leave_together(store, rank, size)
    errors = [report["error"] for report in reports]
    names = _names([report["host"] for report in reports])
    if any(errors):
        same = len(set(errors)) == 1
        lines = errors[:1] if same else [f"{names[n]}: {text}" for n, text in enumerate(errors) if text]
        raise UserError("\n".join(lines)).shared()
    _compare([report["settings"] for report in reports], names)
    return reports[0]["choice"]


def _leave_together(store: Any, rank: int, size: int) -> None:
    """Whoever hosts the store must not exit while others still read from it."""
    store.set(f"read/{rank}", "")
    if rank == 0:
        store.wait([f"read/{other}" for other in range(size)], timedelta(minutes=1))


def _names(hosts: list[str]) -> list[str]:
    """What messages call the process ranks: with their host where there are several."""
    several = len(set(hosts)) > 1
    return [f"process rank {rank}{f' on {host}' if several else ''}" for rank, host in enumerate(hosts)]


def _compare(settings: list[dict[str, str]], names: list[str]) -> None:
    first = settings[0]
    for other, found in enumerate(settings):
        for key in sorted(first.keys() | found.keys()):
            if first.get(key) != found.get(key):
                raise UserError(
                    f"{key}: {names[0]} has {first.get(key, 'nothing')}, {names[other].removeprefix('process ')} has"
                    f" {found.get(key, 'nothing')}; all ranks need the same"
                ).shared()
