"""``narrowgauge launch``: finds the machines of a run and starts torchrun on each."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from narrowgauge.engine.checkpoint.files import find_checkpoints
from narrowgauge.engine.config.config import RunConfig, load_config
from narrowgauge.engine.config.launch_block import LaunchBlock
from narrowgauge.engine.errors import UserError
from narrowgauge.engine.files import local_path
from narrowgauge.engine.ranks.exit_codes import EXIT_NOTHING_SAVED, EXIT_PREEMPTED
from narrowgauge.engine.run_folder import CHECKPOINTS

from ..hosts import read_hostfile
from .container import container_words
from .over_ssh import run_over_ssh
from .process_tree import adopt_orphans, end_children
from .signals import StopSignals, exit_code
from .torchrun import Rendezvous, own_environment, show_command, torchrun_command

DEFAULT_HOSTFILE = Path("/job/hostfile")
_LAST_PORT = 65535
# Seconds that the other nodes of a SLURM job have to end by themselves after one has.
_SRUN_WAIT = 60


def launch(
    config: Path, *, overrides: Sequence[str], fresh: bool, hostfile: Path | None, dry_run: bool, console: Console
) -> int:
    """Start a run where it belongs; returns the exit code, 75 where the ranks were asked to end, 77 where
    they had saved nothing by then, in a SLURM job.

    Inside a SLURM allocation the ranks are started with ``srun``; with a hostfile over ssh; else on this machine.

    Raises:
        UserError: the configuration, the hosts or a host's state does not hold; nothing was started.
    """
    with StopSignals() as signals:
        parsed = load_config(config, overrides).parsed
        block = parsed.launch or LaunchBlock()
        # What only concerns the launch stays here: it may hold secrets, and command lines are seen by all users.
        kept = [text for text in overrides if text.partition("=")[0].split(".")[0] != "launch"]
        words = ["train", str(config), *(word for text in kept for word in ("--set", text))]
        words += ["--fresh"] if fresh else []
        if hostfile is None and DEFAULT_HOSTFILE.is_file():
            hostfile = DEFAULT_HOSTFILE
        if hostfile is not None:
            hosts = read_hostfile(hostfile)
            return run_over_ssh(hosts, block, words, config, signals, num_gpus(), dry_run=dry_run, console=console)
        in_allocation = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ
        num_processes = block.processes_per_node or (_slurm_gpus() if in_allocation else 0) or num_gpus() or 2
        if in_allocation:
            command = _slurm_command(block, words, num_processes)
        else:
            command = torchrun_command(block, words, num_processes=num_processes, with_gpus=num_gpus() > 0)
        environment = own_environment(block, num_processes)
        show_command(console, None, block, environment, command)
        if dry_run:
            return 0
        saved = _checkpoints(parsed)
        code = _run(command, {**os.environ, **environment}, signals)
        is_in_vain = in_allocation and not fresh and code == EXIT_PREEMPTED and _checkpoints(parsed) == saved
        return EXIT_NOTHING_SAVED if is_in_vain else code


def _checkpoints(parsed: RunConfig) -> list[tuple[int, Path]]:
    if parsed.logging is None:
        return []
    return find_checkpoints(local_path(parsed.logging.run_dir, "logging.run_dir") / CHECKPOINTS)


def num_gpus() -> int:
    """The GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def _slurm_gpus() -> int:
    found = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(found) if found.isdigit() else 0


def _slurm_command(block: LaunchBlock, words: Sequence[str], num_processes: int) -> list[str]:
    num_hosts = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    listed = subprocess.run(  # noqa: S603
        [_program("scontrol"), "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0 or not listed.stdout.strip():
        raise UserError(f"SLURM_JOB_NODELIST: scontrol does not know its hosts: {listed.stderr.strip()}")
    container = block.slurm.container
    job = os.environ["SLURM_JOB_ID"]
    # Jobs that share a node must not meet at one port.
    port = block.port + int(job) % min(1000, _LAST_PORT + 1 - block.port)
    host = block.rendezvous_host or listed.stdout.split()[0]
    command = torchrun_command(
        block,
        words,
        num_processes=num_processes,
        rendezvous=Rendezvous(f"{host}:{port}", job, num_hosts),
        with_gpus=num_gpus() > 0,
        python=container.python if container is not None else sys.executable,
    )
    flags: list[str] = []
    if container is not None:
        flags, around = container_words(container, Path.cwd(), with_gpus=num_gpus() > 0)
        command = [*around, *command]
    srun = [_program("srun"), "--nodes", str(num_hosts), "--ntasks-per-node", "1"]
    if "SLURM_CPUS_PER_TASK" in os.environ:
        # Some versions of srun do not take it from the job.
        srun += ["--cpus-per-task", os.environ["SLURM_CPUS_PER_TASK"]]
    srun += ["--kill-on-bad-exit=0", f"--wait={_SRUN_WAIT}"]
    if num_hosts > 1:
        # A log per node, beside the job's.
        log = Path(str(block.slurm.options.get("output") or "%x-%j.log"))
        srun += [f"--output={log.with_name(f'{log.stem}-%N{log.suffix}')}", "--open-mode=append"]
    return [*srun, *flags, *command]


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"SLURM_JOB_ID is set, but there is no {name} on PATH")
    return found


def _run(command: list[str], environment: dict[str, str], signals: StopSignals) -> int:
    adopt_orphans()
    process = subprocess.Popen(command, env=environment)  # noqa: S603
    try:
        signals.pass_on(process.send_signal)
        code = process.wait()
    finally:
        end_children()
    return exit_code([code], signals)
