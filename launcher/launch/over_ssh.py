"""A launch over ssh: a supervisor on each host, told every second that this machine is still there."""

import hashlib
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from narrowgauge.engine.config.launch_block import LaunchBlock
from narrowgauge.engine.errors import UserError
from narrowgauge.engine.ranks.versions import installed_versions

from ..hosts import Host, check_resolve
from ..peer import SSH_LOST, Peer, PeerError, ssh_command
from .signals import StopSignals, exit_code
from .torchrun import Rendezvous, own_environment, show_command, torchrun_command

# Seconds without a line after which a host's supervisor ends its ranks.
_SILENCE = 30.0
# Seconds that a host has to say whether it is fit.
_ANSWER = 60.0
# Seconds that a host's supervisor has to end, and the other hosts once one has failed.
_GRACE = 15.0
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
    peers: list[Peer] = []
    try:
        for number, (host, command) in enumerate(zip(hosts, commands, strict=True)):
            listen = block.port if number == 0 else None
            peer = Peer(host.name, ssh_command(host.login, "narrowgauge.launcher.launch.supervisor"), copies=True)
            peers.append(peer)
            peer.order(**order, command=command, listen=listen)
        asked = time.monotonic()
        problems = [f"{peer.name}: {problem}" for peer in peers if (problem := _problem(peer, asked)) is not None]
        if problems:
            raise UserError("\n".join(problems))
        signals.start()
        for peer in peers:
            peer.say("")
        return exit_code(_wait(peers, signals), signals)
    finally:
        for peer in peers:
            peer.close(_GRACE)


def _problem(peer: Peer, asked: float) -> str | None:
    """Why a host cannot take part, or None."""
    try:
        return peer.answer(_ANSWER, since=asked)["problem"]
    except PeerError as error:
        return str(error)


def _wait(peers: Sequence[Peer], signals: StopSignals) -> list[int]:
    """Wait for all hosts; once one has failed, the others have a little time to end too."""
    failed_at, heard_at = None, 0.0
    while (codes := [peer.process.poll() for peer in peers]) and None in codes:
        lines = [signal.Signals(number).name for number in signals.news()]
        if time.monotonic() - heard_at > 1.0:
            lines, heard_at = [*lines, ""], time.monotonic()
        for peer in peers:
            for line in lines:
                peer.say(line)
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
            for peer, code in zip(peers, codes, strict=True):
                if code:
                    reason = "the connection is lost" if code == SSH_LOST else f"ended with exit code {code}"
                    print(f"error: {peer.name}: {reason}", file=sys.stderr)  # noqa: T201
        # Whoever was asked to end may take long to save.
        if failed_at is not None and not signals.received and time.monotonic() - failed_at > _GRACE:
            late = [peer.name for peer, code in zip(peers, codes, strict=True) if code is None]
            print(f"error: {', '.join(late)}: still running {_GRACE:.0f} s after another host failed", file=sys.stderr)  # noqa: T201
            return [1 if code is None else code for code in codes]
        time.sleep(0.1)
    return [code or 0 for code in codes]
