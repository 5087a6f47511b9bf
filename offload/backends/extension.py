"""Loading DeepSpeed's compiled extensions, one process of the machine at a time.

DeepSpeed compiles what it lacks when it is loaded, on every rank at once, and a build that was killed leaves a lock
file on which the next run waits for ever. Here one process loads or builds while the others wait for it, and stale
locks are removed.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import _get_build_directory


def build_folder(name: str) -> Path:
    """Where PyTorch compiles the extension of that name."""
    return Path(_get_build_directory(name, verbose=False))


def is_compiled(name: str, sources: Path) -> bool:
    """Whether the extension can be loaded without compiling it again.

    Args:
        sources: the folder of the package it is compiled from. Another environment's build, in the same folder of the
            user's, does not count, and neither does one that is older than the installed packages.
    """
    folder, torch_folder = build_folder(name), Path(torch.__file__).parent
    try:
        built_at = (folder / f"{name}.so").stat().st_mtime
        command = (folder / "build.ninja").read_text()
        installed_at = max((package / "__init__.py").stat().st_mtime for package in (torch_folder, sources))
    except OSError:
        return False
    return f"{torch_folder}/include" in command and f"{sources}/" in command and built_at >= installed_at


def load_extension(builder: Any, *, before_build: Callable[[], None] = lambda: None) -> Any:
    """The module of a DeepSpeed builder, compiled if it is not there or older than its sources.

    Args:
        before_build: called if nothing is compiled yet.

    Raises:
        ImportError, OSError, RuntimeError: it cannot be compiled or loaded here.
    """
    folder = build_folder(builder.name)
    with (folder.parent / "narrowgauge.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.parent.glob("*/lock"):
            _remove_stale_lock(stale)
        if not any(folder.glob("*.so")):
            before_build()
        return builder.load(verbose=False)


def _remove_stale_lock(lock: Path) -> None:
    """Remove the lock of a build that was killed: a live one keeps the file open."""
    if not _is_open(lock):
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
