"""The protocol of an I/O backend."""

from typing import Protocol

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
