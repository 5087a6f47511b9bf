"""DeepSpeed's compiled extensions, and what compiles them."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.cpp_extension import get_cxx_compiler

from narrowgauge.engine.backends.deepspeed.extensions import ensure_extensions, uncompiled_extensions
from narrowgauge.offload.backends import BACKENDS
from narrowgauge.offload.backends.deepspeed_build import (
    build_folder,
    outdated,
    prefer_own_ninja,
    remove_stale_locks,
    stale_locks,
)

from .finding import Finding, first_line
from .packages import install_packages

_BUILD = "narrowgauge build"


def build_extensions(progress: Console) -> list[Finding]:
    """Remove what killed builds left and compile what runs load; errors, if any."""
    try:
        remove_stale_locks(_root(), partial(progress.print, highlight=False))
        ensure_extensions(console=progress, aio=not any(backend.unbuildable_because() for backend in BACKENDS.values()))
    except Exception as error:
        # Compilers and loaders fail in many ways.
        return [Finding("error", "build", first_line(error), f"{_BUILD} shows all of the compiler's messages")]
    return []


def check_compiler() -> list[Finding]:
    """A C++ compiler, Python's headers and ninja; errors only where something has yet to be compiled."""
    status = "error" if uncompiled_extensions() else "warning"
    found = []
    compiler = shutil.which(get_cxx_compiler())
    if compiler is None:
        found.append(Finding(status, "C++ compiler", f"no {get_cxx_compiler()} on PATH", install_packages("g++")))
    else:
        found.append(Finding("ok", "C++ compiler", _first_line_of(compiler, "--version")))
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        found.append(Finding(status, "Python.h", "not installed", install_packages("python3-dev")))
    prefer_own_ninja()
    ninja = shutil.which("ninja")
    if ninja is not None:
        found.append(Finding("ok", "ninja", _first_line_of(ninja, "--version")))
    else:
        found.append(Finding(status, "ninja", "not on PATH", install_packages("ninja-build")))
    return found


def _first_line_of(program: str, *words: str) -> str:
    result = subprocess.run([program, *words], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    return first_line(result.stdout or result.stderr)


def check_extensions() -> list[Finding]:
    """What every run loads is compiled, for this torch; no killed build keeps the next one waiting."""
    try:
        root = _root()
    except OSError as error:
        cure = "export TORCH_EXTENSIONS_DIR=FOLDER, one that you can write to"
        return [Finding("error", "extensions", f"{error.filename}: {error.strerror}", cure)]
    missing, old = uncompiled_extensions(), outdated(root)
    found = []
    if missing:
        text = f"{', '.join(missing)}: not compiled for this environment, the first run will do it"
        found.append(Finding("warning", "extensions", text, _BUILD))
    for folder in old:
        text = f"{folder.name}: compiled before torch {torch.__version__} was installed"
        found.append(Finding("warning", "extensions", text, f"rm -r {shlex.quote(str(folder))}"))
    for lock in stale_locks(root):
        text = f"{lock.parent.name}: locked by a build that was killed; the next one waits forever"
        found.append(Finding("error", "extensions", text, f"rm {shlex.quote(str(lock))}"))
    return found or [Finding("ok", "extensions", f"what runs load is compiled for torch {torch.__version__}")]


def check_io_backends() -> list[Finding]:
    """Which ways of moving bytes activation offload can choose from; threads always work."""
    found = []
    for backend in BACKENDS.values():
        reason = backend.unavailable_because()
        if reason is None:
            found.append(Finding("ok", backend.title, "works"))
        elif backend.needs_build:
            text = backend.unbuildable_because() or "not compiled"
            found.append(
                Finding("warning", backend.title, f"{text}; activation offload uses threads", f"{_BUILD} --aio")
            )
        else:
            found.append(Finding("ok", backend.title, f"not used: {reason}"))
    return found


def _root() -> Path:
    """Where PyTorch compiles extensions; made if it does not exist."""
    root = build_folder("async_io").parent
    if not os.access(root, os.W_OK):
        raise PermissionError(13, "cannot be written to", str(root))
    return root
