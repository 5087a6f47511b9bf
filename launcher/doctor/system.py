"""Shared memory and the limits of the operating system."""

import os
import re
import resource
from pathlib import Path

from .finding import Finding, gibibytes

_SHARED = Path("/dev/shm")  # noqa: S108
_LEAST_SHARED = 1 << 30
_LEAST_FILES, _LEAST_PROCESSES, _LEAST_REQUESTS = 4096, 4096, 4096
_CAP_IPC_LOCK = 14
_AIO = Path("/proc/sys/fs")


def check_shared_memory() -> list[Finding]:
    """``/dev/shm``, where ranks of one machine, NCCL and data workers meet."""
    subject = str(_SHARED)
    try:
        status = os.statvfs(_SHARED)
    except OSError as error:
        cure = f"sudo mount --mkdir -t tmpfs -o size=50% tmpfs {_SHARED}"
        return [Finding("error", subject, error.strerror or "missing", cure)]
    size = status.f_blocks * status.f_frsize
    if size >= _LEAST_SHARED:
        return [Finding("ok", subject, gibibytes(size))]
    cure = f"sudo mount -o remount,size=50% {_SHARED}; a container: docker run --shm-size 16g"
    return [Finding("warning", subject, f"{gibibytes(size)}, NCCL and data workers need at least 1 GiB", cure)]


def check_limits() -> list[Finding]:
    """``ulimit``, and the kernel's number of asynchronous I/O requests."""
    return [_open_files(), _locked_memory(), _processes(), _core_files(), _aio_requests()]


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _reaches(soft, _LEAST_FILES):
        return Finding("ok", "open files", _say(soft))
    text = f"{_say(soft)}, sockets of many ranks and data workers need at least {_LEAST_FILES:,}"
    return Finding("warning", "open files", text, _raise("-n", "nofile", 65536, resource.RLIMIT_NOFILE))


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("ok", "locked memory", "unlimited")
    if _may_lock_any():
        return Finding("ok", "locked memory", f"{soft:,} bytes, but this user may lock any (CAP_IPC_LOCK)")
    text = f"{soft:,} bytes, pinned buffers, asynchronous I/O and InfiniBand need more"
    cure = _raise("-l", "memlock", resource.RLIM_INFINITY, resource.RLIMIT_MEMLOCK)
    return Finding("warning", "locked memory", text, cure)


def _may_lock_any() -> bool:
    held = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return held is not None and bool(int(held[1], 16) >> _CAP_IPC_LOCK & 1)


def _processes() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if _reaches(soft, _LEAST_PROCESSES):
        return Finding("ok", "processes", _say(soft))
    text = f"{_say(soft)}, ranks and their threads need at least {_LEAST_PROCESSES:,}"
    return Finding("warning", "processes", text, _raise("-u", "nproc", 65536, resource.RLIMIT_NPROC))


def _core_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    return Finding("ok", "core files", "none are written" if soft == 0 else f"{_say(soft)} bytes")


def _aio_requests() -> Finding:
    if not (_AIO / "aio-nr").exists():
        return Finding("ok", "AIO requests", "not counted by this kernel")
    most, taken = (int((_AIO / name).read_text()) for name in ("aio-max-nr", "aio-nr"))
    text = f"{most - taken:,} of {most:,} free"
    if most - taken >= _LEAST_REQUESTS:
        return Finding("ok", "AIO requests", text)
    return Finding("warning", "AIO requests", text, "sudo sysctl fs.aio-max-nr=1048576")


def _reaches(limit: int, least: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= least


def _say(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _raise(flag: str, name: str, value: int, which: int) -> str:
    """What raises a limit: the shell's command where the hard limit allows it."""
    _, hard = resource.getrlimit(which)
    word = "unlimited" if value == resource.RLIM_INFINITY else str(value)
    if hard == resource.RLIM_INFINITY or (value != resource.RLIM_INFINITY and hard >= value):
        return f"ulimit {flag} {word}"
    return (
        f"echo '* - {name} {word}' | sudo tee -a /etc/security/limits.conf, then log in again;"
        f" a container: docker run --ulimit {name}={-1 if value == resource.RLIM_INFINITY else value}"
    )
