"""The tensors that one forward saves, in order, and their way back."""

import time
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..planner import Forward, Saved
from ..storage.slab import ALIGNMENT, round_up
from ..transfer.memory_only import MemoryOnly
from ..transfer.record import Handle, Plain, Record
from ..transfer.transport import Transport
from .encoding import ForwardEncoding

_WINDOW_SHARE, _WINDOW_TENSORS = 10, 3
_SMALL_PART = 4
_WHOLE, _ENCODED = "_narrowgauge_record", "_narrowgauge_encoded"


class ForwardGraph:
    """Packs and unpacks for one forward.

    Everything hangs on the handles that autograd holds: when a graph is freed, by backward or because it was given
    up, its records die, and with them their extents and buffers.

    Attributes:
        then: weak; the forward whose backward comes after this one's, where that is known.
    """

    def __init__(
        self,
        transport: Transport | MemoryOnly,
        *,
        min_bytes: int,
        budget: float,
        only_marked: bool,
        encoding: ForwardEncoding | None = None,
    ) -> None:
        """
        Args:
            min_bytes: smaller storages stay in memory.
            budget: bytes to offload, from the first saved tensor on; later ones stay in memory.
            only_marked: offload only storages that :func:`mark_layer_input` was called for.
            encoding: what encodes tensors; None where all are kept as they are.
        """
        self._transport, self._min_bytes, self._budget = transport, min_bytes, budget
        self._only_marked, self._clock, self._encoding = only_marked, transport.counters.clock, encoding
        self.then: weakref.ref[ForwardGraph] | None = None
        self._records: list[weakref.ref[Record]] = []
        self._cursor: int | None = None
        # Bytes that may be read before its own backward has begun.
        self._early = 0
        self._read_from: float | None = None
        self._backward_began = False
        self._sizes: list[int] = []
        self._packed_at: list[float] = []
        self._unpacked_at: dict[int, float] = {}
        self.stall = 0.0
        self.offered = 0
        self.began = time.perf_counter()

    def pack(self, tensor: Tensor) -> Handle | Plain:
        """The saved-tensor hook of forward."""
        if not _is_ordinary(tensor):
            if isinstance(tensor, nn.Parameter) and type(tensor.data) is Tensor:
                keep_in_memory(tensor)
            return Plain(tensor)
        storage = tensor.untyped_storage()
        base = tensor._base if tensor._base is not None else tensor
        if isinstance(base, nn.Parameter) or hasattr(storage, "_narrowgauge_kept") or storage.nbytes() == 0:
            return Plain(tensor)
        if base is not tensor and base.is_leaf and _SMALL_PART * tensor.nbytes < storage.nbytes():
            # A small part of data that somebody holds anyway, such as a batch of a data set.
            return Plain(tensor)
        # Whole bytes serve whoever saves the tensor; codes only those whose tensors are encoded.
        record = self._known(storage, _WHOLE, tensor, base)
        if record is None:
            encoding = self._encoding if self._encoding is not None and self._encoding.serves(base, storage) else None
            name = _WHOLE if encoding is None else _ENCODED
            record = self._known(storage, name, tensor, base) if encoding is not None else None
            if record is None:
                record = self._new_record(tensor, base, storage, encoding)
                setattr(storage, name, weakref.ref(record))
        return Handle(record, tensor)

    def _known(self, storage: Any, name: str, tensor: Tensor, base: Tensor) -> Record | None:
        """This forward's record of a storage, as it is now; not that of another forward that saved it."""
        known = getattr(storage, name, None)
        record = known() if known is not None else None
        if record is None or record.index >= len(self._records) or self._records[record.index]() is not record:
            return None
        return record if record.base() is base and record.version == tensor._version else None

    def _new_record(self, tensor: Tensor, base: Tensor, storage: Any, encoding: ForwardEncoding | None) -> Record:
        transport = self._transport
        transport.settle()
        record = Record(
            tensor,
            base,
            index=len(self._records),
            fetch=transport.fetch,
            counters=transport.counters,
            encoded=encoding.encode(base) if encoding is not None else None,
        )
        self._records.append(weakref.ref(record))
        marked = not self._only_marked or hasattr(storage, "_narrowgauge_layer_input")
        if marked and record.nbytes >= self._min_bytes:
            self.offered += record.nbytes
            self._sizes.append(record.nbytes)
            self._packed_at.append(self._clock())
            record.slot = len(self._sizes) - 1
            if self.offered <= self._budget:
                self._transport.offload(record)
        return record

    def unpack(self, packed: Handle | Plain) -> Tensor:
        """The saved-tensor hook of backward."""
        if isinstance(packed, Plain):
            return packed.unpack()
        self._transport.settle()
        record = packed.record
        if record.slot is not None and record.slot not in self._unpacked_at:
            self._unpacked_at[record.slot] = self._clock()
        self._prefetch(record)
        try:
            return packed.unpack()
        finally:
            self.stall += record.waited
            record.waited = 0.0

    def _prefetch(self, record: Record) -> None:
        """Read what comes next, backwards from ``record``, as far as the buffers reach; then the next backward's."""
        if not self._backward_began:
            self._backward_began = True
            self._transport.set_window(self.window)
            self._note_reading()
        if self._cursor is None or (record.index > self._cursor and record.in_memory() is None):
            self._cursor = record.index
        while self._cursor > 0:
            before = self._records[self._cursor - 1]()
            if before is not None and not self._transport.prefetch(before):
                return
            self._cursor -= 1
        following = self.then() if self.then is not None else None
        if following is not None:
            following.read_ahead()

    def read_ahead(self) -> None:
        """Read what backward will ask for first, as far as the buffers reach: it is the next one."""
        if self._cursor is None:
            self._cursor, self._early = len(self._records), self.window
            self._note_reading()
        while self._cursor > 0 and self._early > 0:
            record = self._records[self._cursor - 1]()
            if record is not None:
                if not self._transport.prefetch(record):
                    return
                self._early -= record.nbytes
            self._cursor -= 1

    def _note_reading(self) -> None:
        if self._read_from is None:
            self._read_from = self._clock()

    def living_records(self) -> list[Record]:
        """Those that autograd still holds, in the order of saving."""
        found = [reference() for reference in self._records]
        return [record for record in found if record is not None]

    @property
    def first_size(self) -> int:
        """Bytes of the first tensor that may be offloaded."""
        return self._sizes[0] if self._sizes else 0

    @property
    def window(self) -> int:
        """Bytes to read ahead, if nobody set another size."""
        return read_ahead(self._sizes, self.offered)

    @property
    def is_profiled(self) -> bool:
        """Whether backward has been through."""
        return bool(self._sizes) and len(self._unpacked_at) >= 0.9 * len(self._sizes)

    def profile(self, group: Hashable = None) -> Forward:
        """What was saved, when it was asked for, and from when on it could be read, once backward has been through."""
        assert self._read_from is not None
        saved = [
            Saved(size, packed, self._unpacked_at.get(slot))
            for slot, (size, packed) in enumerate(zip(self._sizes, self._packed_at, strict=True))
        ]
        return Forward(saved, self._read_from, group)


def read_ahead(sizes: Sequence[int], total: int) -> int:
    """Bytes to read before backward asks for them: little of the whole, but several tensors of the larger kind.

    The largest few are left out: logits are many times what a layer saves.
    """
    large = sorted(sizes)[len(sizes) * 9 // 10] if sizes else 0
    return round_up(max(total // _WINDOW_SHARE, _WINDOW_TENSORS * (large + ALIGNMENT)))


def keep_in_memory(tensor: Tensor) -> None:
    """Leave tensors over this one's memory where they are: a parameter's, or what is freed and filled by others."""
    storage: Any = tensor.untyped_storage()
    storage._narrowgauge_kept = True


def mark_layer_input(tensor: Tensor) -> None:
    """Offload this tensor where only the inputs of layers are."""
    if type(tensor) is Tensor:
        storage: Any = tensor.untyped_storage()
        storage._narrowgauge_layer_input = True


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_quantized
    )
