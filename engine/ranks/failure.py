"""One process rank's failure ends all: told through the rendezvous store, which also those hear that wait in a
collective for the one that is gone.

torchrun notices a rank that has ended, and asks the others to end; but one that waits in NCCL cannot hear a signal's
handler, and takes the signal for a wish to save.
"""

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from ..config.redaction import redact_text
from ..errors import UserError, first_line
from .agreement import agreed_store, num_meetings
from .environment import process_rank, world_size
from .exit_codes import EXIT_BAD_INPUT, EXIT_PREEMPTED
from .preemption import Preempted

_KEY = "failed"
# Seconds between looks at the store.
_POLL = 1.0
# Seconds that a rank has to end by itself once it has failed, or heard that another has.
_GRACE = 6.0


class RankFailed(Exception):
    """Another process rank has failed, so that this one cannot go on."""


class FailureWatch:
    """Listens for other ranks' failures from a thread of its own, while it is entered, and tells them this one's.

    A rank that has heard of one, or failed itself, and has not ended a few seconds later, is ended where it is.
    """

    def __init__(self) -> None:
        self._store, self._told, self._ended = _own_connection(), False, threading.Event()
        # Of another rank's failure; the store may be gone by the time that its consequences are met here.
        self._heard: str | None = None
        self._thread = threading.Thread(target=self._listen, name="narrowgauge-failures", daemon=True)

    def __enter__(self) -> "FailureWatch":
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def tell(self, error: BaseException) -> None:
        """This rank is about to end with ``error``; what it still closes must not keep it.

        Raises:
            RankFailed: another failed before, and the error is only what follows from that.
        """
        if self._store is None:
            return
        self._end_later(error)
        if isinstance(error, Preempted) or getattr(error, "on_all_ranks", False):
            return
        self._told = True
        try:
            first = self._post(f"{process_rank()}|{say_where()}: {say_what(error)}")
        except Exception:
            # Who keeps the store is gone: nobody can be told.
            first = self._heard
            if first is None:
                return
        if first is not None:
            raise RankFailed(f"ended, as {first}") from error
        self._let_others_read()

    def tell_of_end(self, reason: str) -> None:
        """This rank is about to end without an error, and nobody may be there who would end the others."""
        if self._store is None:
            return
        # The store may be gone, or not answer.
        thread = threading.Thread(target=self._post_reason, args=(reason,), name="narrowgauge-end", daemon=True)
        thread.start()
        thread.join(_GRACE)
        self._let_others_read()

    def _post_reason(self, reason: str) -> None:
        with suppress(Exception):
            self._post(f"{process_rank()}|{say_where()}: {reason}")

    def _let_others_read(self) -> None:
        if process_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # This process keeps the store; the others look once more.
            time.sleep(2 * _POLL)

    def _post(self, text: str) -> str | None:
        """Leave word, unless another rank has; returns the other's."""
        found = self._store.compare_set(_KEY, "", text).decode()
        return None if found == text else found.partition("|")[2]

    def _listen(self) -> None:
        while not self._ended.wait(_POLL):
            try:
                heard = self._store.get(_KEY).decode() if self._store.check([_KEY]) else None
            except Exception:
                return
            if heard is None or heard.partition("|")[0] == str(process_rank()):
                continue
            self._heard = heard.partition("|")[2]
            if not self._ended.wait(_GRACE) and not self._told:
                _leave(f"ended, as {self._heard}")
            return

    def _end_later(self, error: BaseException) -> None:
        def end() -> None:
            if not self._ended.wait(_GRACE + 2 * _POLL):
                _leave(say_what(error), exit_code_of(error))

        threading.Thread(target=end, name="narrowgauge-end", daemon=True).start()


def say_where() -> str:
    """What messages call this process rank."""
    return f"process rank {process_rank()} on {socket.gethostname()}"


def say_what(error: BaseException) -> str:
    """An error in one line; of what is no user's error, also its kind."""
    text = redact_text(first_line(error))
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def _own_connection() -> Any:
    """The store that the ranks agreed on, over a connection that no waiting call of this process holds."""
    store = agreed_store()
    return (
        PrefixStore(f"narrowgauge/failure/{num_meetings()}", store.clone())
        if store is not None and world_size() > 1
        else None
    )


def exit_code_of(error: BaseException) -> int:
    """What a process that ends with an error exits with."""
    if isinstance(error, Preempted):
        return EXIT_PREEMPTED
    return EXIT_BAD_INPUT if isinstance(error, UserError) else 1


def _leave(text: str, code: int = 1) -> None:
    if code != EXIT_PREEMPTED:
        text = f"error: {say_where()}: {text}"
    print(text, file=sys.stderr, flush=True)  # noqa: T201
    os._exit(code)
