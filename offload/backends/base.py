"""What an I/O backend is."""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """One thread's way to the disk. Calls block, and release the interpreter's lock.

    ``buffer`` is a uint8 tensor in host memory; its address and length, and ``offset`` in the file, are multiples of
    4096. All of it is moved, or ``OSError`` is raised.
    """

    def write(self, fd: int, offset: int, buffer: Tensor) -> None: ...

    def read(self, fd: int, offset: int, buffer: Tensor) -> None: ...

    def close(self) -> None: ...


class IOBackend(Protocol):
    """Makes lanes, and the buffers they move fastest.

    Attributes:
        name: as in the configuration.
        writes_in_place: takes any host memory, so that a CPU tensor need not be copied into a buffer first.
        moves_device_memory: takes memory of the GPU, so that a CUDA tensor need not be copied to the host first.
    """

    name: str
    writes_in_place: bool
    moves_device_memory: bool

    def lane(self) -> Lane: ...

    def new_buffer(self, nbytes: int) -> Tensor:
        """Page-aligned uint8 host memory; ``nbytes`` is a multiple of 4096."""
        ...

    def free_buffer(self, buffer: Tensor) -> None:
        """Give back memory that Python's reference counting does not."""
        ...


class Backend(ABC):
    """Base of the backends that are chosen by name: an :class:`IOBackend` that says whether it works here.

    It is constructed without arguments, and only where :meth:`unavailable_because` has nothing to say.
    """

    name: str
    title: str
    """What it is, in a few words, for people."""
    needs_build: bool = False
    """:meth:`build` compiles something; ``narrowgauge build --aio`` calls it."""
    writes_in_place: bool = False
    moves_device_memory: bool = False

    @classmethod
    def unavailable_because(cls) -> str | None:
        """Why it cannot be used as things are; None where it can."""
        return None

    @classmethod
    def unbuildable_because(cls) -> str | None:
        """Why :meth:`build` would fail; None where it would not, or where there is nothing to build."""
        return None

    @classmethod
    def build(cls, announce: Callable[[str], None]) -> list[str]:
        """Compile what it needs, which may take minutes; called only where it was asked for.

        Args:
            announce: told what is about to take long.

        Returns:
            What is ready then, by name; empty where there is nothing to compile.

        Raises:
            ImportError, OSError, RuntimeError: it cannot be compiled here.
        """
        return []

    @abstractmethod
    def lane(self) -> Lane:
        """A new one, for one thread."""

    def new_buffer(self, nbytes: int) -> Tensor:
        """See :meth:`IOBackend.new_buffer`; pinned where there is a GPU."""
        if torch.cuda.is_available():
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        memory = mmap.mmap(-1, nbytes)
        with suppress(OSError):
            # Pinning pages for direct I/O costs much less if they are few.
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def free_buffer(self, buffer: Tensor) -> None:
        """See :meth:`IOBackend.free_buffer`; here Python frees it."""
        return
