"""Where there is no disk: saved tensors, encoded or not, stay in memory."""

from torch import UntypedStorage

from ..errors import OffloadError
from .counters import Counters
from .record import Record


class MemoryOnly:
    """In the place of :class:`.transport.Transport`: nothing is moved.

    Attributes:
        store: there is none.
    """

    name = "memory"
    capacity = buffer_bytes = lanes_alive = lanes_busy = 0
    store = None

    def __init__(self) -> None:
        self.counters = Counters()
        self._closed = False

    def settle(self) -> None:
        """Count what died since the last time."""
        self.counters.deaths.settle()

    def set_window(self, nbytes: int) -> None:
        """Nothing is read ahead."""

    def offload(self, record: Record) -> None:
        """It stays."""

    def prefetch(self, record: Record) -> bool:
        """It is there."""
        return True

    def fetch(self, record: Record) -> UntypedStorage:
        """A record's bytes."""
        if self._closed:
            raise OffloadError("activation offload was closed before backward was done")
        storage = record.in_memory()
        assert storage is not None
        return storage

    def close(self) -> None:
        """A backward still to come will raise."""
        self._closed = True
