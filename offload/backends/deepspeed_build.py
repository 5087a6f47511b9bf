"""DeepSpeed's compiled extensions: built by one process of the machine at a time, or loaded as they are.

DeepSpeed compiles what it lacks when it is loaded, on every rank at once, and a build that was killed leaves a lock
file on which the next run waits forever. Here one process builds while the others wait for it, and stale locks are
removed.
"""

import ctypes
import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import _get_build_directory, _import_module_from_library

_TOOLS = {
    "ninja",
    "c++",
    "g++",
    "cc1plus",
    "clang++",
    "as",
    "ld",
    "collect2",
    "nvcc",
    "cudafe++",
    "cicc",
    "ptxas",
    "hipcc",
}


def build_folder(name: str) -> Path:
    """Where PyTorch compiles the extension of that name."""
    return Path(_get_build_directory(name, verbose=False))


def outdated(root: Path) -> list[Path]:
    """The folders in ``root`` of extensions compiled for this environment before its PyTorch was installed.

    PyTorch would load them all the same: its headers are not among the files that decide for ninja.
    """
    torch_folder = Path(torch.__file__).parent
    installed = (torch_folder / "__init__.py").stat().st_mtime
    found = []
    for command in root.glob("*/build.ninja"):
        library = command.parent / f"{command.parent.name}.so"
        if _names(command.read_text(), f"{torch_folder}/include") and library.exists():
            found += [command.parent] if library.stat().st_mtime < installed else []
    return sorted(found)


def is_compiled(name: str, sources: Path) -> bool:
    """Whether the extension is compiled, to the end, for the installed packages of this environment.

    Environments share the user's folder of builds, so what is there may be another's.

    Args:
        sources: the folder of the package it is compiled from.
    """
    torch_folder = Path(torch.__file__).parent
    try:
        folder = build_folder(name)
        command = (folder / "build.ninja").read_text()
        before = [folder / "build.ninja", torch_folder / "__init__.py", sources / "__init__.py"]
        is_last = (folder / f"{name}.so").stat().st_mtime >= max(file.stat().st_mtime for file in before)
    except OSError:
        return False
    return is_last and _names(command, f"{torch_folder}/include") and _names(command, f"{sources}/")


def _names(command: str, path: str) -> bool:
    """Whether a build names a path, and not only one that ends alike (``/other`` before it)."""
    return re.search(rf"(\s|-I){re.escape(path)}", command) is not None


def import_compiled(name: str, *, symbols_for_others: bool = False) -> Any:
    """The module of an extension for which :func:`is_compiled` holds; unlike DeepSpeed's loading, never compiles.

    Args:
        symbols_for_others: make the library's symbols known to those that are loaded later.

    Raises:
        ImportError, OSError: it does not work here.
    """
    folder = build_folder(name)
    module = _import_module_from_library(name, str(folder), True)
    if symbols_for_others:
        ctypes.CDLL(str(folder / f"{name}.so"), mode=ctypes.RTLD_GLOBAL)
    return module


def prefer_own_ninja() -> None:
    """Let this process, and those it starts, compile with the ninja of its environment rather than the system's.

    PyTorch takes the first on PATH. Each version of ninja takes the other's builds for out of date, so that what was
    built by ``narrowgauge build`` was compiled again, for minutes, by a run in an activated environment.
    """
    own = Path(sys.executable).parent
    path = os.environ.get("PATH", os.defpath)
    if shutil.which("ninja", path=str(own)) is not None and not path.startswith(f"{own}{os.pathsep}"):
        os.environ["PATH"] = f"{own}{os.pathsep}{path}"


def build_extension(
    builder: Any,
    *,
    needs: Sequence[str] = (),
    is_current: Callable[[], bool] | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> None:
    """Let a DeepSpeed builder compile what is not there or older than its sources, and load it.

    Args:
        needs: other extensions that the builder compiles besides its own.
        is_current: says of a build that is there whether it can be used; if not, it is made from nothing: torch's
            headers are not among the files that decide for ninja. None: ninja alone decides.
        announce: told what is about to take long.

    Raises:
        ImportError, OSError, RuntimeError: it cannot be compiled or loaded here.
    """
    prefer_own_ninja()
    folders = [build_folder(name) for name in (*needs, builder.name)]
    with _one_at_a_time(folders[0].parent, announce):
        for folder in folders:
            _remove_stale_lock(folder / "lock", announce)
            if is_current is not None and not is_current():
                for file in (*folder.glob("*.so"), *folder.glob("*.o")):
                    file.unlink()
        if not any(folders[-1].glob("*.so")):
            announce(f"compiling DeepSpeed's {builder.name}, once")
        builder.load(verbose=False)


def stale_locks(root: Path) -> list[Path]:
    """The locks of builds that were killed, of all extensions whose folders are in ``root``."""
    return sorted(filter(_is_stale, root.glob("*/lock")))


def remove_stale_locks(root: Path, announce: Callable[[str], None] = lambda _: None) -> None:
    """Remove :func:`stale_locks`; waits while another process builds."""
    with _one_at_a_time(root, announce):
        for lock in root.glob("*/lock"):
            _remove_stale_lock(lock, announce)


@contextmanager
def _one_at_a_time(root: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Only one process of the machine builds extensions in ``root``."""
    with (root / "narrowgauge.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce("waiting for another process that builds DeepSpeed's extensions")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_stale_lock(lock: Path, announce: Callable[[str], None]) -> None:
    """A compiler that has outlived the build that started it is waited for: it writes what the next one would read."""
    if not _is_stale(lock):
        return
    if _is_compiled_in(lock.parent):
        announce(f"waiting for compilers that were left in {lock.parent} by a build that was killed")
        while _is_compiled_in(lock.parent):
            time.sleep(0.2)
    announce(f"{lock.parent.name}: the lock of a build that was killed is removed")
    lock.unlink(missing_ok=True)


def _is_stale(lock: Path) -> bool:
    """A live build keeps its lock file open."""
    return lock.exists() and not _is_open(lock)


def _is_compiled_in(folder: Path) -> bool:
    """Whether a build tool works in the folder, as ninja and the compilers that it starts do."""
    target = str(folder.resolve())
    return any(_leads_to(cwd, target) and _name_of(cwd.parent) in _TOOLS for cwd in Path("/proc").glob("[0-9]*/cwd"))


def _name_of(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""


def _leads_to(link: Path, target: str) -> bool:
    try:
        return os.readlink(link) == target
    except OSError:
        return False


def _is_open(path: Path) -> bool:
    target = str(path.resolve())
    return any(_leads_to(descriptor, target) for descriptor in Path("/proc").glob("[0-9]*/fd/*"))
