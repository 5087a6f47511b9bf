"""Building DeepSpeed's extensions before they are needed.

DeepSpeed compiles what it lacks the first time it is used, on every rank at once, and a build that was killed leaves
a lock file on which the next run waits for ever. Here one process of the machine builds, the others wait for it, and
stale locks are removed.
"""

import fcntl
import os
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from rich.console import Console
from torch.utils.cpp_extension import _get_build_directory

from .config import Config


def ensure_extensions(config: Config | None = None, console: Console | None = None, *, aio: bool = False) -> list[str]:
    """Build what a run loads on this machine's kind of accelerator; returns the names of the extensions.

    On the CPU every run loads DeepSpeed's shared-memory communication (20 to 50 s, once). DeepSpeed's own optimizers
    bring their kernels; compact ones need none.

    Args:
        config: of the run; None builds what all runs load.
        console: where a build that is about to start is announced.
        aio: also what activation offload can use instead of its own threads (minutes, once; needs libaio-dev).
    """
    accelerator: Any = get_accelerator()
    wanted = ["ShareMemCommBuilder"] if accelerator.device_name() == "cpu" else []
    wanted += _of_optimizer(config) if config is not None else []
    offload = config.offload() if config is not None else None
    if aio or (offload is not None and offload.backend == "aio"):
        wanted.append("AsyncIOBuilder")
    names = []
    for builder in filter(None, map(accelerator.create_op_builder, wanted)):
        folder = Path(_get_build_directory(builder.name, verbose=False))
        with (folder.parent / "narrowgauge.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _remove_stale_lock(folder / "lock")
            if console is not None and not any(folder.glob("*.so")):
                console.print(f"compiling DeepSpeed's {builder.name}, once", highlight=False)
            builder.load(verbose=False)
        names.append(builder.name)
    return names


def _of_optimizer(config: Config) -> list[str]:
    """The builder of the kernel that DeepSpeed takes for its own optimizer of this configuration."""
    block, zero = config.parsed.optimizer, config.parsed.zero_optimization
    if block is None or block.params.get("torch_adam"):
        return []
    offloaded: Any = zero.offload_optimizer if zero is not None else None
    on_cpu = offloaded is not None and offloaded.device != "none"
    kernels = {"adam": "Adam", "adamw": "Adam", "lion": "Lion", "lamb": "Lamb"}
    kernel = kernels.get(block.type.lower())
    if kernel is None:
        return []
    return [f"CPU{kernel}Builder" if on_cpu and kernel != "Lamb" else f"Fused{kernel}Builder"]


def _remove_stale_lock(lock: Path) -> None:
    """Remove the lock of a build that was killed: a live one keeps the file open."""
    if lock.exists() and not _is_open(lock):
        lock.unlink(missing_ok=True)


def _is_open(path: Path) -> bool:
    target = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == target:
                return True
        except OSError:
            continue
    return False
