"""One saved storage: where its bytes are, and how backward gets them."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from ..codecs import Decoder
from ..storage.level import Level
from ..storage.slab import Extent
from .buffers import Lent
from .counters import Counters
from .lanes import Transfer


class Footprint:
    """What a record counts for. It outlives the record, to take that back."""

    __slots__ = ("_amounts",)

    def __init__(self) -> None:
        self._amounts: dict[Level, int] = {}

    def add(self, level: Level, nbytes: int) -> None:
        self._amounts[level] = nbytes
        level.add(nbytes)

    def remove(self, level: Level) -> None:
        level.add(-self._amounts.pop(level, 0))

    def remove_all(self) -> None:
        for level in list(self._amounts):
            self.remove(level)


class Record:
    """The bytes of one storage as they were when a forward first saved a tensor over it.

    They are in ``storage`` (the forward's own, or one read back), in ``host`` (a buffer they were staged in), in
    ``extent`` on disk, or in several of these. Lanes write fields in an order in which at least one is always set.

    Attributes:
        fetch: gets the bytes, wherever they are.
        nbytes: of the storage.
        base: weak; the tensor whose version counter ``version`` was read from. A storage may have several counters.
        version: the counter at saving.
        whole: ``base`` covers the storage. Else its other parts may have counters of their own and may change at any
            time (``unsafe_chunk``, as recurrent cells use it): the storage must be copied before it is written.
        storage: holds the memory; None once it is given up.
        storage_ref: weak; a storage that holds the bytes for as long as somebody else needs it.
        extent, delta, checksum: the bytes on disk: ``nbytes`` of them, from byte ``delta`` of the extent on.
        decoder: the way back where the bytes are a codec's; None where they are the tensor's.
        decoded: weak; memory that was decoded, for as long as somebody else needs it.
        slot: number among the tensors that may be offloaded; None for the others.
        pinned: a write that is under way must not give the memory up, backward is close.
        waited: seconds for which backward waited for it.
    """

    __slots__ = (
        "__weakref__",
        "_counters",
        "_version_probe",
        "base",
        "checksum",
        "decoded",
        "decoder",
        "delta",
        "device",
        "extent",
        "fetch",
        "footprint",
        "handles",
        "host",
        "index",
        "load",
        "nbytes",
        "pinned",
        "read_transfer",
        "ready",
        "slot",
        "storage",
        "storage_ref",
        "unpacked",
        "version",
        "waited",
        "whole",
        "write_transfer",
    )

    def __init__(
        self,
        tensor: Tensor,
        base: Tensor,
        *,
        index: int,
        fetch: "Callable[[Record], UntypedStorage]",
        counters: Counters,
        encoded: tuple[Tensor, Decoder] | None = None,
    ) -> None:
        """
        Args:
            tensor: what is saved.
            base: of which it is a view, or itself.
            index: number among the records of one forward.
            encoded: codes that are kept in the place of the base's bytes, and the way back from them.
        """
        kept, self.decoder = encoded if encoded is not None else (tensor, None)
        self.decoded: Any = None
        storage: Any = kept.untyped_storage()
        self.fetch, self._counters, self.index = fetch, counters, index
        self.device, self.nbytes = tensor.device, storage.nbytes()
        self.base, self.version = weakref.ref(base), tensor._version
        self.whole = self.decoder is not None or base.numel() * base.element_size() == self.nbytes
        # Shares the version counter, and nothing else: the memory can go while changes are still noticed.
        self._version_probe = tensor.detach()
        self._version_probe.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self.storage: UntypedStorage | None = storage
        self.storage_ref: Any = weakref.ref(storage)
        self.host: Lent | None = None
        self.extent: Extent | None = None
        self.delta, self.checksum = 0, 0
        self.write_transfer: Transfer | None = None
        self.read_transfer: Transfer | None = None
        self.ready: torch.cuda.Event | None = None
        self.pinned = False
        self.handles = self.unpacked = self.load = 0
        self.waited = 0.0
        self.slot: int | None = None
        self.footprint = Footprint()
        beside = self.decoder.nbytes if self.decoder is not None else 0
        self.footprint.add(counters.saved, self.nbytes + beside)
        self.footprint.add(counters.resident, self.nbytes + beside)
        counters.deaths.watch(self, self.footprint.remove_all)

    @property
    def changed(self) -> bool:
        """Whether the tensor was written to in place since it was saved."""
        return self._version_probe._version != self.version

    @property
    def current_version(self) -> int:
        return self._version_probe._version

    @property
    def place(self) -> str:
        """Where the bytes are on disk, for messages."""
        return self.extent.place if self.extent is not None else "activation offload"

    def in_memory(self) -> UntypedStorage | None:
        """A storage that has the bytes now, without waiting."""
        return self.storage or self.storage_ref()

    def tensor_bytes(self) -> UntypedStorage:
        """The saved tensor's bytes, decoded where they are a codec's.

        Raises:
            OffloadError: they are unavailable.
        """
        if self.decoder is None:
            return self.fetch(self)
        storage = self.decoded() if self.decoded is not None else None
        if storage is None:
            storage = self.decoder.decode(self.fetch(self))
            self.decoded = weakref.ref(storage)
        return storage

    def give_up_storage(self) -> None:
        """Let go of the forward's memory, or of what was read back."""
        self.storage = None
        self.footprint.remove(self._counters.resident)

    def take_storage(self, storage: UntypedStorage) -> None:
        """Hold memory that was read back."""
        self.load += 1
        self.unpacked = 0
        self.storage_ref = weakref.ref(storage)
        self.storage = storage
        self.read_transfer = None

    def call_off_write(self) -> None:
        """Keep the memory if it is still there: backward is about to ask for it."""
        if self.write_transfer is None or self.pinned:
            return
        self.pinned = True
        self._counters.forwarded += self.nbytes
        if self.write_transfer.claim():
            self.write_transfer.finish()


class Handle:
    """What autograd holds instead of a saved tensor: a view of a record."""

    __slots__ = ("dtype", "offset", "original", "record", "seen", "shape", "stride")

    def __init__(self, record: Record, tensor: Tensor) -> None:
        self.record = record
        self.dtype, self.shape, self.stride = tensor.dtype, tensor.shape, tensor.stride()
        self.offset = tensor.storage_offset()
        self.original = weakref.ref(tensor)
        self.seen = -1
        record.handles += 1

    def unpack(self) -> Tensor:
        """The saved tensor.

        Raises:
            RuntimeError: it was changed in place since, as autograd says it.
            OffloadError: its bytes are unavailable.
        """
        record = self.record
        if record.changed:
            raise_changed(self.dtype, record.device, self.shape, record.current_version, record.version)
        original = self.original()
        if original is not None and original.untyped_storage() is record.in_memory():
            # Somebody holds it. As without hooks: another tensor over its memory could become a gradient.
            if record.load == 0:
                record.call_off_write()
            return original
        storage = record.tensor_bytes()
        if torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore[reportAttributeAccessIssue]
            # What backward gets may become a gradient that is added to, and the bytes will be asked for again.
            storage = storage.clone()
        tensor = torch.empty(0, dtype=self.dtype, device=record.device)
        tensor.set_(storage, self.offset, self.shape, self.stride)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if self.seen != record.load:
            self.seen = record.load
            record.unpacked += 1
            # Bytes that are also on disk need not stay once every holder has had them (``retain_graph``).
            if record.extent is not None and record.load and record.unpacked >= record.handles:
                record.storage = None
        return tensor


class Plain:
    """What autograd holds for a tensor that is left where it is: a parameter, or one that cannot be offloaded."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # An operation's own output would keep its graph alive forever.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version

    def unpack(self) -> Tensor:
        tensor = self.tensor
        if tensor._version != self.version:
            raise_changed(tensor.dtype, tensor.device, tensor.shape, tensor._version, self.version)
        return tensor


def raise_changed(dtype: torch.dtype, device: torch.device, shape: Any, found: int, expected: int) -> None:
    """The error that autograd raises where no hooks are set."""
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation:"
        f" [{str(dtype).removeprefix('torch.')} tensor {list(shape)} on {device}] is at version {found}; expected"
        f" version {expected} instead. Hint: enable anomaly detection to find the operation that failed to compute its"
        " gradient, with torch.autograd.set_detect_anomaly(True)."
    )
