"""The ``launch`` block: how the process ranks of a run are started."""

from typing import Literal

from pydantic import Field

from .blocks import Count, StrictBlock
from .slurm_block import SlurmBlock


class LaunchBlock(StrictBlock):
    """Read by ``narrowgauge launch`` and ``narrowgauge slurm``; other launchers have flags of their own."""

    processes_per_node: Count | None = None
    """Default: the number of GPUs, or 2 on a machine without any."""
    threads_per_process: Count | None = None
    """Of CPU operations; default the cores, shared equally."""
    numa_binding: Literal["none", "node", "socket", "exclusive", "core-complex"] | None = None
    """torchrun's; default ``node`` where there are GPUs."""
    interface: str | None = Field(default=None, min_length=1)
    """Network interface of NCCL and Gloo, such as ``eth0``."""
    port: int = Field(default=29500, ge=1024, le=65535)
    """Of the rendezvous, on the first host."""
    max_restarts: int = Field(default=0, ge=0)
    """Times that torchrun starts all ranks anew after a failure; they resume from the newest checkpoint."""
    shutdown_timeout: Count = 600
    """Seconds that the ranks have to save when they are asked to end."""
    rendezvous_host: str | None = Field(default=None, min_length=1)
    """Where the hosts meet; default the first host's name."""
    slurm: SlurmBlock = SlurmBlock()
    """Of batch jobs."""
    environment: dict[str, str] = {}
    """More variables for the ranks."""
