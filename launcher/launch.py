"""``narrowgauge launch``: finds the machines of a run and starts torchrun on each."""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from narrowgauge.engine.config import load_config
from narrowgauge.engine.errors import UserError
from narrowgauge.engine.launch_block import LaunchBlock
from narrowgauge.engine.preemption import EXIT_PREEMPTED
from narrowgauge.engine.redaction import HIDDEN, redact_text
from narrowgauge.engine.versions import installed_versions
from rich.console import Console

from .hosts import Host, check_resolve, read_hostfile
from .ssh import ssh_command
from .torchrun import Rendezvous, own_environment, torchrun_command

DEFAULT_HOSTFILE = Path("/job/hostfile")
# Seconds without a line after which a host's supervisor ends its ranks.
_SILENCE = 30.0
# ssh's own exit code when it cannot go on.
_SSH_LOST = 255
# Seconds that the other hosts have to end by themselves after one has failed.
_GRACE = 15.0
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Of this machine's environment, what the other hosts get too.
_EXPORTED = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "HF_HOME", "HF_HUB_OFFLINE", "PYTHONPATH", "DS_", "TMPDIR")


def launch(
    config: Path, *, overrides: Sequence[str], fresh: bool, hostfile: Path | None, dry_run: bool, console: Console
) -> int:
    """Start a run where it belongs; returns the exit code, 75 where all ranks saved on request.

    Inside a SLURM allocation the ranks are started with ``srun``; with a hostfile over ssh; else on this machine.

    Raises:
        UserError: the configuration, the hosts or a host's state does not hold; nothing was started.
    """
    block = load_config(config, overrides).parsed.launch or LaunchBlock()
    # What only concerns the launch stays here: it may hold secrets, and command lines are seen by all users.
    words = [
        "train",
        str(config),
        *(word for text in overrides if not text.startswith("launch.") for word in ("--set", text)),
    ]
    words += ["--fresh"] if fresh else []
    if hostfile is None and DEFAULT_HOSTFILE.is_file():
        hostfile = DEFAULT_HOSTFILE
    if "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ and hostfile is None:
        return _run_here(_slurm_command(block, words), block, 1, dry_run, console)
    if hostfile is None:
        num_processes = block.processes_per_node or _num_gpus() or 2
        command = torchrun_command(block, words, num_processes=num_processes, with_gpus=_num_gpus() > 0)
        return _run_here(command, block, num_processes, dry_run, console)
    hosts = read_hostfile(hostfile)
    return _run_over_ssh(hosts, block, words, config, dry_run, console)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _slurm_command(block: LaunchBlock, words: Sequence[str]) -> list[str]:
    num_hosts = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    listed = subprocess.run(  # noqa: S603
        [_program("scontrol"), "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
    )
    job = os.environ["SLURM_JOB_ID"]
    rendezvous = Rendezvous(
        f"{block.rendezvous_host or listed.stdout.split()[0]}:{block.port + int(job) % 1000}", job, num_hosts
    )
    gpus = os.environ.get("SLURM_GPUS_ON_NODE")
    num_processes = block.processes_per_node or (int(gpus) if gpus and gpus.isdigit() else 0) or _num_gpus() or 2
    command = torchrun_command(
        block, words, num_processes=num_processes, rendezvous=rendezvous, with_gpus=_num_gpus() > 0
    )
    words = [_program("srun"), "--nodes", str(num_hosts), "--ntasks-per-node", "1", "--kill-on-bad-exit=0"]
    if num_hosts > 1:
        # A log per node, beside the job's.
        log = Path(str(block.slurm.get("output") or "%x-%j.log"))
        words += [f"--output={log.with_name(f'{log.stem}-%N{log.suffix}')}", "--open-mode=append"]
    return [*words, *command]


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"SLURM_JOB_ID is set, but there is no {name} on PATH")
    return found


def _run_here(command: list[str], block: LaunchBlock, num_processes: int, dry_run: bool, console: Console) -> int:
    environment = own_environment(block, num_processes)
    _show(console, None, block, environment, command)
    if dry_run:
        return 0
    process = subprocess.Popen(command, env={**os.environ, **environment})  # noqa: S603
    with _forwarding([process.send_signal]) as asked:
        code = process.wait()
    return _exit_code([code], asked)


def _exit_code(codes: Sequence[int], asked: Sequence[int]) -> int:
    if not any(codes):
        return 0
    return EXIT_PREEMPTED if asked and signal.SIGINT not in asked else 1


@contextlib.contextmanager
def _forwarding(receivers: Sequence[Any]) -> Iterator[list[int]]:
    """Pass signals on; yields those that came."""
    asked: list[int] = []

    def forward(number: int, frame: Any) -> None:
        asked.append(number)
        for receive in receivers:
            with contextlib.suppress(OSError):
                receive(number)

    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _show(
    console: Console, host: str | None, block: LaunchBlock, environment: dict[str, str], command: Sequence[str]
) -> None:
    """Print a command as it could be typed, but for the values of the user's own variables."""
    shown = {key: HIDDEN if key in block.environment else shlex.quote(value) for key, value in environment.items()}
    text = redact_text(" ".join([*(f"{key}={value}" for key, value in shown.items()), shlex.join(command)]))
    console.print(f"{host}: {text}" if host is not None else text, highlight=False, markup=False, soft_wrap=True)


def _run_over_ssh(
    hosts: list[Host], block: LaunchBlock, words: list[str], config: Path, dry_run: bool, console: Console
) -> int:
    check_resolve(hosts)
    num_processes = block.processes_per_node or hosts[0].slots or _num_gpus() or 2
    rendezvous = Rendezvous(f"{block.rendezvous_host or hosts[0].name}:{block.port}", uuid.uuid4().hex[:8], len(hosts))
    environment = own_environment(block, num_processes)
    commands = [
        torchrun_command(
            block,
            words,
            num_processes=num_processes,
            rendezvous=rendezvous,
            address=host.name,
            with_gpus=_num_gpus() > 0,
        )
        for host in hosts
    ]
    for host, command in zip(hosts, commands, strict=True):
        _show(console, host.name, block, environment, command)
    if dry_run:
        return 0
    exported = {key: value for key, value in os.environ.items() if key.startswith(_EXPORTED)}
    files = {str(config): hashlib.sha256(config.read_bytes()).hexdigest()}
    remotes = [
        _Remote(
            host.name,
            {
                "command": command,
                "folder": str(Path.cwd()),
                "environment": exported | environment,
                "files": files,
                "versions": installed_versions(),
                "gpus": num_processes if _num_gpus() else 0,
                "listen": block.port if number == 0 else None,
                "silence": _SILENCE,
            },
        )
        for number, (host, command) in enumerate(zip(hosts, commands, strict=True))
    ]
    try:
        problems = [f"{remote.host}: {problem}" for remote in remotes if (problem := remote.problem()) is not None]
        if problems:
            raise UserError("\n".join(problems))
        with _forwarding([remote.forward for remote in remotes]) as asked:
            for remote in remotes:
                remote.say("")
            return _exit_code(_wait(remotes), asked)
    finally:
        for remote in remotes:
            remote.end()


def _wait(remotes: Sequence["_Remote"]) -> list[int]:
    """Wait for all hosts; once one has failed, the others have a little time to end too."""
    failed_at = None
    while (codes := [remote.process.poll() for remote in remotes]) and None in codes:
        for remote in remotes:
            remote.say("")
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
            for remote, code in zip(remotes, codes, strict=True):
                if code:
                    reason = "the connection is lost" if code == _SSH_LOST else f"ended with exit code {code}"
                    print(f"error: {remote.host}: {reason}", file=sys.stderr)  # noqa: T201
        if failed_at is not None and time.monotonic() - failed_at > _GRACE:
            late = [remote.host for remote, code in zip(remotes, codes, strict=True) if code is None]
            print(f"error: {', '.join(late)}: still running {_GRACE:.0f} s after another host failed", file=sys.stderr)  # noqa: T201
            return [1 if code is None else code for code in codes]
        time.sleep(1.0)
    return [code or 0 for code in codes]


class _Remote:
    """The connection to one host's supervisor."""

    def __init__(self, host: str, order: dict[str, Any]) -> None:
        self.host = host
        self.process = subprocess.Popen(  # noqa: S603
            ssh_command(host, "narrowgauge.launcher.node"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._copy, args=(self.process.stderr, sys.stderr, self._errors), daemon=True).start()
        self.say(json.dumps(order))

    def problem(self) -> str | None:
        """Why the host cannot take part, or None; waits for its answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        try:
            found = json.loads(line)["problem"]
        except (ValueError, KeyError, TypeError):
            self.process.wait(10)
            return "; ".join(self._errors[-3:]) or f"no answer over ssh (exit code {self.process.returncode})"
        if found is None:
            threading.Thread(target=self._copy, args=(self.process.stdout, sys.stdout, None), daemon=True).start()
        return found

    def _copy(self, source: Any, target: Any, kept: list[str] | None) -> None:
        for line in source:
            if kept is not None:
                kept.append(line.strip())
            print(f"{self.host}: {line}", end="", file=target, flush=True)

    def say(self, line: str) -> None:
        """Send a line; a connection that is gone shows in the process's end."""
        assert self.process.stdin is not None
        with self._lock, contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def forward(self, number: int) -> None:
        self.say(signal.Signals(number).name)

    def end(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
