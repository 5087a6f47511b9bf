"""A launch over ssh: a supervisor on each host, told every second that this machine is still there."""

import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from narrowgauge.engine.config.launch_block import LaunchBlock
from narrowgauge.engine.errors import UserError
from narrowgauge.engine.ranks.versions import installed_versions

from ..hosts import Host, check_resolve
from ..ssh import ssh_command
from .show import show_command
from .signals import StopSignals, exit_code
from .torchrun import Rendezvous, own_environment, torchrun_command

# Seconds without a line after which a host's supervisor ends its ranks.
_SILENCE = 30.0
# Seconds that a host has to say whether it is fit.
_ANSWER = 60.0
# Seconds that the other hosts have to end by themselves after one has failed.
_GRACE = 15.0
# ssh's own exit code when it cannot go on.
_SSH_LOST = 255
# Of this machine's environment, what the other hosts get too.
_EXPORTED = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "HF_HOME", "HF_HUB_OFFLINE", "PYTHONPATH", "DS_", "TMPDIR")


def run_over_ssh(
    hosts: list[Host],
    block: LaunchBlock,
    words: list[str],
    config: Path,
    signals: StopSignals,
    num_gpus: int,
    *,
    dry_run: bool,
    console: Console,
) -> int:
    """Start torchrun on all hosts and wait for them; returns the exit code.

    Raises:
        UserError: naming the hosts that cannot take part; nothing was started.
    """
    check_resolve(hosts)
    num_processes = block.processes_per_node or hosts[0].slots or num_gpus or 2
    rendezvous = Rendezvous(f"{block.rendezvous_host or hosts[0].name}:{block.port}", uuid.uuid4().hex[:8], len(hosts))
    environment = own_environment(block, num_processes)
    commands = [
        torchrun_command(
            block, words, num_processes=num_processes, rendezvous=rendezvous, address=host.name, with_gpus=num_gpus > 0
        )
        for host in hosts
    ]
    for host, command in zip(hosts, commands, strict=True):
        show_command(console, host.name, block, environment, command)
    if dry_run:
        return 0
    exported = {key: value for key, value in os.environ.items() if key.startswith(_EXPORTED)}
    order = {
        "folder": str(Path.cwd()),
        "environment": exported | environment,
        "files": {str(config): hashlib.sha256(config.read_bytes()).hexdigest()},
        "versions": installed_versions(),
        "processes": num_processes,
        "silence": _SILENCE,
    }
    remotes: list[_Remote] = []
    try:
        for number, (host, command) in enumerate(zip(hosts, commands, strict=True)):
            listen = block.port if number == 0 else None
            remotes.append(_Remote(host.name, {**order, "command": command, "listen": listen}))
        deadline = time.monotonic() + _ANSWER
        problems = [f"{one.host}: {problem}" for one in remotes if (problem := one.problem(deadline)) is not None]
        if problems:
            raise UserError("\n".join(problems))
        signals.start()
        for remote in remotes:
            remote.say("")
        return exit_code(_wait(remotes, signals), signals)
    finally:
        for remote in remotes:
            remote.end()


def _wait(remotes: Sequence["_Remote"], signals: StopSignals) -> list[int]:
    """Wait for all hosts; once one has failed, the others have a little time to end too."""
    failed_at, heard_at = None, 0.0
    while (codes := [remote.process.poll() for remote in remotes]) and None in codes:
        lines = [signal.Signals(number).name for number in signals.news()]
        if time.monotonic() - heard_at > 1.0:
            lines, heard_at = [*lines, ""], time.monotonic()
        for remote in remotes:
            for line in lines:
                remote.say(line)
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
            for remote, code in zip(remotes, codes, strict=True):
                if code:
                    reason = "the connection is lost" if code == _SSH_LOST else f"ended with exit code {code}"
                    print(f"error: {remote.host}: {reason}", file=sys.stderr)  # noqa: T201
        # Whoever was asked to end may take long to save.
        if failed_at is not None and not signals.received and time.monotonic() - failed_at > _GRACE:
            late = [remote.host for remote, code in zip(remotes, codes, strict=True) if code is None]
            print(f"error: {', '.join(late)}: still running {_GRACE:.0f} s after another host failed", file=sys.stderr)  # noqa: T201
            return [1 if code is None else code for code in codes]
        time.sleep(0.1)
    return [code or 0 for code in codes]


class _Remote:
    """The connection to one host's supervisor."""

    def __init__(self, host: str, order: dict[str, Any]) -> None:
        self.host = host
        self.process = subprocess.Popen(  # noqa: S603
            ssh_command(host, "narrowgauge.launcher.launch.supervisor"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A signal that a terminal sends to all processes is passed on as a line.
            start_new_session=True,
        )
        self._errors: list[str] = []
        self._answer: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read_errors, daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()
        self.say(json.dumps(order))

    def problem(self, deadline: float) -> str | None:
        """Why the host cannot take part, or None; waits for its answer."""
        try:
            answer = self._answer.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return f"no answer over ssh within {_ANSWER:.0f} s"
        if answer is not None:
            return answer["problem"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE)
        return "; ".join(self._errors[-3:]) or f"no answer over ssh (exit code {self.process.returncode})"

    def _read(self) -> None:
        """Find the supervisor's answer among what login scripts may print; then copy what the ranks print."""
        assert self.process.stdout is not None
        answered = False
        for line in self.process.stdout:
            answer = None if answered else _as_answer(line)
            if answer is not None:
                answered = True
                self._answer.put(answer)
            else:
                print(f"{self.host}: {line}", end="", flush=True)  # noqa: T201
        self._answer.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors.append(line.strip())
            del self._errors[:-3]
            print(f"{self.host}: {line}", end="", file=sys.stderr, flush=True)  # noqa: T201

    def say(self, line: str) -> None:
        """Send a line; a connection that is gone shows in the process's end."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def end(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _as_answer(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "problem" in found else None
