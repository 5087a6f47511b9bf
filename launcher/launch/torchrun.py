"""The torchrun command of one host, the environment it runs in, and how both are shown. Light to import."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from narrowgauge.engine.config.launch_block import LaunchBlock
from narrowgauge.engine.config.redaction import HIDDEN, redact, redact_text


@dataclass(frozen=True)
class Rendezvous:
    """Where the hosts of a run meet.

    Attributes:
        endpoint: ``HOST:PORT``, on the first host.
        run_id: the same on all hosts, another for every launch.
    """

    endpoint: str
    run_id: str
    num_hosts: int


def torchrun_command(
    block: LaunchBlock,
    train_words: Sequence[str],
    *,
    num_processes: int,
    rendezvous: Rendezvous | None = None,
    address: str | None = None,
    with_gpus: bool = False,
    python: str = sys.executable,
) -> list[str]:
    """The words of a torchrun command.

    Args:
        train_words: what follows ``narrowgauge``: ``train CONFIG ...``.
        rendezvous: None on a single host.
        address: of this host, as the others reach it.
        with_gpus: ranks are bound to the CPUs near their GPU unless the configuration says otherwise.
        python: the interpreter where the ranks run.
    """
    words = [python, "-m", "narrowgauge.launcher.agent"]
    if rendezvous is None:
        words += ["--standalone"]
    else:
        words += [
            *("--nnodes", str(rendezvous.num_hosts)),
            *("--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", rendezvous.endpoint),
            *("--rdzv-id", rendezvous.run_id),
        ]
        if address is not None:
            words += ["--local-addr", address]
    words += ["--nproc-per-node", str(num_processes)]
    words += ["--max-restarts", str(block.max_restarts)]
    binding = block.numa_binding or ("node" if with_gpus and _can_bind() else "none")
    if binding != "none":
        words += ["--numa-binding", binding]
    return [*words, "-m", "narrowgauge.launcher", *train_words]


def _can_bind() -> bool:
    """Whether this version of torchrun binds ranks to CPUs."""
    from torch.distributed.run import get_args_parser

    return "--numa-binding" in get_args_parser().format_help()


def own_environment(block: LaunchBlock, num_processes: int) -> dict[str, str]:
    """What the configuration adds to the environment of the ranks."""
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))
    own = {"OMP_NUM_THREADS": str(block.threads_per_process or max(1, cores // num_processes))}
    if block.interface is not None:
        own |= {"NCCL_SOCKET_IFNAME": block.interface, "GLOO_SOCKET_IFNAME": block.interface}
    # A preempted run needs the time to save. Versions of torchrun that do not know it wait for 30 s.
    own["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(block.shutdown_timeout)
    return own | block.environment


def show_command(
    console: Console, host: str | None, block: LaunchBlock, environment: dict[str, str], command: Sequence[str]
) -> None:
    """Print a command with its environment, but for the values of the user's own variables and of secrets."""
    shown = {key: HIDDEN if key in block.environment else shlex.quote(value) for key, value in environment.items()}
    words = [_without_secret(word) if before == "--set" else word for before, word in zip(["", *command], command)]  # noqa: B905
    text = redact_text(" ".join([*(f"{key}={value}" for key, value in shown.items()), shlex.join(words)]))
    console.print(f"{host}: {text}" if host is not None else text, highlight=False, markup=False, soft_wrap=True)


def _without_secret(override: str) -> str:
    path, _, value = override.partition("=")
    return f"{path}={redact(value, tuple(path.split('.')))}"
