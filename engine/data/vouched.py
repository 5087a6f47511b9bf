"""One check of a cached folder for all process ranks of a host: the first that comes makes it, the others trust it.

It holds for the start of the run that it was made for, while the process that made it lives: that is one of the ranks
that start together. Nothing here needs a process group.
"""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..ranks.agreement import num_meetings
from ..ranks.environment import world_size

# With the parent, the launcher's process on this host, they say which start of which run this is.
_OF_A_START = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


@contextmanager
def one_rank_at_a_time(folder: Path) -> Iterator[None]:
    """Within this host; free where the run has a single rank."""
    if world_size() == 1:
        yield
        return
    with _note_of(folder).open("a") as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        yield


def is_vouched(folder: Path) -> bool:
    """Whether a rank of this host has found the folder whole at this start, and nobody has touched it since."""
    if world_size() == 1:
        return False
    try:
        note = json.loads(_note_of(folder).read_text())
        return note["start"] == _start() and note["files"] == _files(folder) and _birth(note["pid"]) == note["birth"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def vouch(folder: Path) -> None:
    """This rank has found the folder whole, or has made it; called by :func:`one_rank_at_a_time`."""
    if world_size() > 1:
        note = {"start": _start(), "pid": os.getpid(), "birth": _birth(os.getpid()), "files": _files(folder)}
        _note_of(folder).write_text(json.dumps(note))


def whole_once(folder: Path, is_whole: Callable[[], bool]) -> bool:
    """:func:`is_vouched`, or else what ``is_whole`` finds."""
    if is_vouched(folder):
        return True
    found = is_whole()
    if found:
        vouch(folder)
    return found


def _note_of(folder: Path) -> Path:
    return Path(f"{folder}.checked-{socket.gethostname()}")


def _start() -> list[Any]:
    parent = os.getppid()
    return [parent, _birth(parent), num_meetings(), *(os.environ.get(key) for key in _OF_A_START)]


def _birth(pid: int) -> str:
    """When a process that lives was started, in ticks since boot; numbers of processes are used again."""
    # After the name, which may hold anything.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _files(folder: Path) -> dict[str, list[int]]:
    stats = {str(path.relative_to(folder)): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: [s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats.items()}
