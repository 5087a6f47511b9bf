"""The connection to one host's side of ``narrowgauge doctor``."""

import contextlib
import json
import queue
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

_SSH_FAILED = 255
# Seconds for a process to end once it is not needed any more.
_GRACE = 5.0


class PeerError(Exception):
    """A host gave no answer.

    Attributes:
        host: its name.
        by_ssh: it was not even reached.
    """

    def __init__(self, host: str, message: str, *, by_ssh: bool = False) -> None:
        super().__init__(message)
        self.host, self.by_ssh = host, by_ssh


class Peer:
    """Asks :mod:`~.doctor_node` on a host.

    Attributes:
        name: of the host.
    """

    def __init__(self, name: str, words: Sequence[str]) -> None:
        """
        Args:
            words: the command that runs the host's side and is connected to it.
        """
        self.name = name
        self._process = subprocess.Popen(  # noqa: S603
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_lines, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors += filter(None, (line.strip() for line in self._process.stderr))

    def say(self, **order: Any) -> None:
        """Give an order; of a connection that is gone :meth:`answer` tells."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def answer(self, timeout: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            PeerError: there is none.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise PeerError(self.name, f"no answer within {timeout:.0f} s") from None
        try:
            return json.loads(line)
        except ValueError:
            raise self._failure(line.strip()) from None

    def _failure(self, line: str) -> PeerError:
        if line:
            return PeerError(self.name, f"{line!r} instead of an answer")
        # Its standard output is closed, so it has ended or is about to.
        code = self._process.wait()
        self._readers[1].join(_GRACE)
        message = self._errors[-1] if self._errors else f"exit code {code}"
        return PeerError(self.name, message, by_ssh=code == _SSH_FAILED)

    def ask(self, *, timeout: float, **order: Any) -> dict[str, Any]:
        """Give an order and wait for the answer; see :meth:`answer`."""
        self.say(**order)
        return self.answer(timeout)

    def close(self) -> None:
        """End the host's side."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
