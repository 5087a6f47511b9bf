"""The ``launch`` block: how the process ranks of a run are started."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from .blocks import Count, StrictBlock


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
    slurm: dict[str, str | int | None] = {}
    """Options of sbatch without their dashes, such as ``{"nodes": 4, "partition": "gpu"}``; null leaves one out."""
    environment: dict[str, str] = {}
    """More variables for the ranks."""

    @field_validator("slurm")
    @classmethod
    def _one_line_each(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, text in value.items():
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                raise ValueError(f"expected an option of sbatch without its dashes, got {key!r}")
            if text is not None and not re.fullmatch(r"[^\s#'\"`$\\]+", str(text)):
                raise ValueError(f"{key}: expected a word without spaces and quotes, got {text!r}")
        asked = value.get("signal")
        if asked is not None and not re.fullmatch(r"(?i)B:((SIG)?USR1|10)(@\d{1,5})?", str(asked)):
            raise ValueError(
                f"signal: expected B:USR1@SECONDS, got {asked!r}: the batch script (B:) hears USR1, lets the ranks save"
                " and goes back into the queue; other signals end it, and without B: it hears none"
            )
        return value
