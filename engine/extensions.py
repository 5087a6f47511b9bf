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
from torch.utils.cpp_extension import _get_build_directory


def ensure_extensions() -> list[str]:
    """Build what every run on this machine's kind of accelerator loads; returns the names of the extensions.

    On the CPU that is DeepSpeed's shared-memory communication (20 to 50 s, once); on CUDA nothing is loaded unasked.
    """
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cpu":
        return []
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    if builder is None:
        return []
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with (folder.parent / "narrowgauge.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_stale_lock(folder / "lock")
        builder.load(verbose=False)
    return [builder.name]


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
