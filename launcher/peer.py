"""The connection to this package's side on another host: JSON lines over ssh's standard input and output."""

import contextlib
import json
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from narrowgauge.engine.errors import UserError

SSH_LOST = 255
"""ssh's own exit code when it cannot reach a host, or not any more."""

# Tells an answer from JSON that other programs print.
_MARK = "narrowgauge"
# Of what a host says on standard error, the last lines tell why it gave no answer.
_KEPT_ERRORS = 3
# Seconds for a process that has closed its output to end.
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


def ssh_command(host: str, module: str) -> list[str]:
    """The words that run ``module`` on a host over ssh, with this interpreter's path there.

    Raises:
        UserError: there is no ssh.
    """
    ssh = shutil.which("ssh")
    if ssh is None:
        raise UserError("--hostfile: expected ssh on PATH, got none")
    inner = f"cd / && exec {shlex.quote(sys.executable)} -m {module}"
    return [ssh, "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", host, inner]


class Peer:
    """Gives orders to a host's side and takes its answers, JSON objects of one line each.

    Attributes:
        name: of the host.
        process: ssh, or whatever was started to reach the host's side.
    """

    def __init__(self, name: str, words: Sequence[str], *, copies: bool = False) -> None:
        """
        Args:
            words: the command that runs the host's side and is connected to it.
            copies: the host gives one answer; what it prints besides, and all that it prints after, is copied to this
                process's output with the host's name. Without it, only answers are looked for.
        """
        self.name = name
        self.process = subprocess.Popen(  # noqa: S603
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A signal that a terminal sends to all processes is not for ssh: the host's side is told in a line.
            start_new_session=True,
        )
        self._copies = copies
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        """Find the answers among what login scripts, and then the host's side, may print."""
        assert self.process.stdout is not None
        expects = True
        for line in self.process.stdout:
            answer = _as_answer(line) if expects else None
            if answer is not None:
                expects = not self._copies
                self._answers.put(answer)
            elif self._copies:
                print(f"{self.name}: {line}", end="", flush=True)  # noqa: T201
        self._answers.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.strip():
                self._errors = [*self._errors, line.strip()][-_KEPT_ERRORS:]
            if self._copies:
                print(f"{self.name}: {line}", end="", file=sys.stderr, flush=True)  # noqa: T201

    def say(self, line: str) -> None:
        """Send a line; of a connection that is gone :meth:`answer` tells, and the process's end."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def order(self, **values: Any) -> None:
        """Send an order, a JSON object."""
        self.say(json.dumps(values))

    def answer(self, timeout: float, *, since: float | None = None) -> dict[str, Any]:
        """The next answer.

        Args:
            timeout: seconds.
            since: where they begin, on :func:`time.monotonic`'s clock; default now.

        Raises:
            PeerError: there is none.
        """
        now = time.monotonic()
        begin = since if since is not None else now
        try:
            answer = self._answers.get(timeout=max(0.0, begin + timeout - now))
        except queue.Empty:
            raise PeerError(self.name, f"no answer within {timeout:.0f} s") from None
        if answer is None:
            raise self._failure()
        return answer

    def _failure(self) -> PeerError:
        """Why there is no answer: the host's side has closed its output, so it has ended or is about to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE)
        self._readers[1].join(_GRACE)
        code = self.process.returncode
        message = "; ".join(self._errors) or f"no answer (exit code {code})"
        return PeerError(self.name, message, by_ssh=code == SSH_LOST)

    def ask(self, *, timeout: float, **values: Any) -> dict[str, Any]:
        """Give an order and wait for the answer; see :meth:`answer`."""
        self.order(**values)
        return self.answer(timeout)

    def close(self, grace: float = _GRACE) -> None:
        """End the host's side, which has ``grace`` seconds for it."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.close()
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def reply(**values: Any) -> None:
    """On the host's side: answer."""
    print(json.dumps({_MARK: values}), flush=True)  # noqa: T201


def _as_answer(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found.get(_MARK) if isinstance(found, dict) else None
