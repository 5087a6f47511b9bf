"""The rendezvous store of one attempt: torchrun keeps the store when it starts all ranks again, with the addresses and
reports of the processes before, which the new ones must not read.
"""

import hashlib
import os
import time
import uuid
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from ..errors import UserError

_POLL = 0.05


def may_restart() -> bool:
    """Whether torchrun was told to start the ranks again after a failure."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def store_of_attempt(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """The part of the store that only the processes of this attempt use.

    Every rank posts a word. Process rank 0 lists all words, again as long as one changes; the list counts once every
    rank has found its own, present word in it and confirmed the list. Nodes may be at different restarts, so that
    torchrun's count of them does not name an attempt.

    Raises:
        UserError: some rank did not come in time.
    """
    meeting, own = PrefixStore("narrowgauge/attempt", store), uuid.uuid4().hex
    meeting.set(f"word/{rank}", own)
    deadline = time.monotonic() + timeout.total_seconds()
    while (agreed := _round(meeting, rank, size, own)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"the process ranks did not all come within {timeout}")
        time.sleep(_POLL)
    return PrefixStore(f"narrowgauge/attempt/{agreed}", store)


def _round(meeting: Any, rank: int, size: int, own: str) -> str | None:
    """One look at the store; the name of the attempt once it is agreed."""
    if rank == 0:
        words = [_get(meeting, f"word/{other}") for other in range(size)]
        if "" in words:
            return None
        meeting.set("words", ",".join(words))
    words = _get(meeting, "words").split(",")
    if len(words) != size or words[rank] != own:
        return None
    name = hashlib.sha256(",".join(words).encode()).hexdigest()[:16]
    meeting.set(f"confirmed/{rank}", name)
    if rank == 0 and all(_get(meeting, f"confirmed/{other}") == name for other in range(size)):
        meeting.set("agreed", name)
    return name if _get(meeting, "agreed") == name else None


def _get(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
