"""DeepSpeed's asynchronous I/O (libaio), contained.

As of DeepSpeed 0.19.8 it reports a failed write as a success, ends the process on a short file or on a wait with
nothing pending, and drops the end of a length that is not a multiple of 512. So every call here is one blocking
transfer of whole blocks within a file whose length is known, a lane has its own handle, and the caller's checksums
decide whether the bytes arrived. The first write of a process logs a warning from C++ inside ``std::call_once``, with
the interpreter's lock held by whoever waits for that: two threads' first writes can stop each other forever, so the
first one is done alone.
"""

import errno
import math
import os
import re
import resource
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OffloadError
from .base import Backend
from .deepspeed_build import build_extension, import_compiled, is_compiled
from .registry import register

_BLOCK_BYTES = 1 << 20
_QUEUE_DEPTH = 32
_LEAST_LOCKABLE = 256 << 20
_EXTENSIONS = ("pin_memory", "async_io")
_PIN_MEMORY_LOADED = "_deepspeed_pin_memory_op_module"
_first_write, _has_written = threading.Lock(), threading.Event()


def is_built() -> bool:
    """Whether the extension can be loaded without compiling it. Does not import DeepSpeed, which takes seconds."""
    package = _deepspeed()
    if package is None:
        return False
    return _comes_with(package) or all(is_compiled(name, package) for name in _EXTENSIONS)


def _deepspeed() -> Path | None:
    found = find_spec("deepspeed")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def _comes_with(package: Path) -> bool:
    """DeepSpeed can be installed with its extensions."""
    return any(package.glob("ops/aio/async_io_op*.so"))


def _builder() -> Any:
    """DeepSpeed's builder for this machine's accelerator; another one's flags would compile everything again."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    return accelerator.create_op_builder("AsyncIOBuilder")


def _lockable() -> float:
    """Bytes of memory that this process may still lock."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or os.geteuid() == 0 or torch.cuda.is_available():
        return math.inf
    locked = re.search(r"^VmLck:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return limit - (int(locked[1]) << 10 if locked else 0)


def _load() -> Any:
    builder, package = _builder(), _deepspeed()
    if package is not None and _comes_with(package):
        return builder.load(verbose=False)
    # Of DeepSpeed's: what it has loaded, and will not load a second time.
    loaded = builder._loaded_ops
    if "async_io" not in loaded:
        if not hasattr(sys, _PIN_MEMORY_LOADED):
            setattr(sys, _PIN_MEMORY_LOADED, import_compiled("pin_memory", symbols_for_others=True))
        loaded["async_io"] = import_compiled("async_io")
    return loaded["async_io"]


@register
class AioBackend(Backend):
    """One handle a lane; moves page-locked buffers only, others it would copy."""

    name = "aio"
    title = "asynchronous I/O"
    needs_build = True

    @classmethod
    def unavailable_because(cls) -> str | None:
        if is_built():
            return None
        return "DeepSpeed is not installed" if _deepspeed() is None else "not compiled (narrowgauge build --aio)"

    @classmethod
    def unbuildable_because(cls) -> str | None:
        if _deepspeed() is None:
            return "DeepSpeed is not installed"
        if is_built() or _builder().is_compatible(verbose=False):
            return None
        return "libaio and its header are not installed (apt-get install libaio-dev)"

    @classmethod
    def build(cls, announce: Callable[[str], None]) -> list[str]:
        """Compile DeepSpeed's extension if need be; see :func:`~.deepspeed_build.build_extension`."""
        build_extension(_builder(), needs=_EXTENSIONS[:1], is_current=is_built, announce=announce)
        return [_EXTENSIONS[1]]

    def __init__(self) -> None:
        """Load the extension.

        Raises:
            OffloadError: it is not compiled, which takes minutes and so is never done unasked.
            ImportError, OSError, RuntimeError: it does not work here.
        """
        if not is_built():
            raise OffloadError("backend: DeepSpeed's aio is not compiled (narrowgauge build --aio)")
        if _lockable() < _LEAST_LOCKABLE:
            raise OffloadError(
                f"backend: aio locks its buffers in memory, and this user may lock {_lockable():,} bytes (ulimit -l);"
                f" expected at least {_LEAST_LOCKABLE:,}"
            )
        self._module: Any = _load()
        self._allocator = self._new_handle()

    def _new_handle(self) -> Any:
        return self._module.aio_handle(
            block_size=_BLOCK_BYTES,
            queue_depth=_QUEUE_DEPTH,
            single_submit=False,
            overlap_events=True,
            intra_op_parallelism=1,
        )

    def lane(self) -> "AioLane":
        return AioLane(self._new_handle())

    def new_buffer(self, nbytes: int) -> Tensor:
        if torch.cuda.is_available():
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        if nbytes > _lockable():
            # DeepSpeed would end the process.
            raise MemoryError(f"{nbytes:,} bytes of memory cannot be locked, {_lockable():,} can (ulimit -l)")
        return self._allocator.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8))

    def free_buffer(self, buffer: Tensor) -> None:
        if not torch.cuda.is_available():
            self._allocator.free_cpu_locked_tensor(buffer)


class AioLane:
    """See :class:`~.base.Lane`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def write(self, fd: int, offset: int, buffer: Tensor) -> None:
        _check_range(fd, offset, buffer)
        with nullcontext() if _has_written.is_set() else _first_write:
            # A slab has no name; its descriptor has.
            completed = self._handle.pwrite(buffer, f"/proc/self/fd/{fd}", False, False, offset)
        _has_written.set()
        self._check("write", completed)

    def read(self, fd: int, offset: int, buffer: Tensor) -> None:
        _check_range(fd, offset, buffer)
        self._check("read", self._handle.pread(buffer, f"/proc/self/fd/{fd}", False, False, offset))

    def _check(self, operation: str, completed: int) -> None:
        if completed != 1:
            raise OSError(errno.EIO, f"DeepSpeed's aio could not {operation}, it returned {completed}")

    def close(self) -> None:
        del self._handle


def _check_range(fd: int, offset: int, buffer: Tensor) -> None:
    size = os.fstat(fd).st_size
    if offset + buffer.nbytes > size:
        raise OSError(errno.EIO, f"expected a file of at least {offset + buffer.nbytes} bytes, got {size}")
