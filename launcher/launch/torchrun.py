"""The torchrun command of one host, and the environment it runs in. Light to import."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from narrowgauge.engine.config.launch_block import LaunchBlock


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
) -> list[str]:
    """The words of a torchrun command.

    Args:
        train_words: what follows ``narrowgauge``: ``train CONFIG ...``.
        rendezvous: None on a single host.
        address: of this host, as the others reach it.
        with_gpus: ranks are bound to the CPUs near their GPU unless the configuration says otherwise.
    """
    words = [sys.executable, "-m", "narrowgauge.launcher.agent"]
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
