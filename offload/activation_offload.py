"""``ActivationOffload``: what a training loop uses."""

import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .backends import BackendName, IOBackend, make_backend
from .backends.probe import Speed, measure
from .errors import OffloadError, OffloadSpaceError
from .options import Granularity, check_arguments, to_folders
from .planner import absorbable_bytes
from .saving.graph import ForwardGraph, mark_parameter
from .saving.recompute import RecomputedLayers
from .stats import Endurance, OffloadStats
from .storage.slab import SlabStore, available_bytes, round_up
from .transfer.transport import Transport

_LEAST_CAPACITY = 64 << 20
# A plan is made anew for the first forwards, then every so many, and whenever the disk's speed has changed.
_FIRST_FORWARDS, _PLAN_INTERVAL, _SPEED_CHANGE = 5, 20, 0.2
# Bytes written now and then by a plan that writes nothing, to notice when the disk has become fast enough.
_PROBE_INTERVAL, _PROBE_BYTES = 32, 8 << 20
_ENOUGH_TO_MEASURE = 4 << 20


class ActivationOffload:
    """Keeps what forward saves for backward on NVMe instead of in memory, bit for bit.

    Wrap the forward; backward needs nothing::

        offload = ActivationOffload("/scratch")
        for batch in batches:
            with offload:
                loss = model(**batch).loss
            loss.backward()
            ...
        offload.close()

    Saved tensors are written while forward goes on, and read back in reverse order while backward does. They are
    dropped when autograd drops them. Parameters are left alone. Works for CPU and CUDA tensors, on any number of
    threads and with any number of forwards whose backward is still to come. Not fork-safe: make it after forking.

    After SSDTrain (Wu et al., 2024, arXiv 2408.10013): the idea of overlapping the I/O with compute and of forwarding
    what is asked for while it is still being written. The adaptive amount is planned from measured times (see
    :func:`~.planner.absorbable_bytes`), not from that paper's model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        granularity: Granularity = "saved_tensors",
        min_tensor_bytes: int = 256 << 10,
        keep_resident: float | Literal["auto"] = "auto",
        backend: BackendName | IOBackend = "auto",
        num_lanes: int = 2,
        buffer_bytes: int | None = None,
        host_memory_bytes: int = 0,
        capacity_bytes: int | None = None,
        io_timeout: float = 300.0,
        rated_tbw: float | None = None,
        drive_bytes: int | None = None,
        max_drive_writes_per_day: float | None = None,
        model: nn.Module | None = None,
        layers: Sequence[nn.Module] | None = None,
    ) -> None:
        """
        Args:
            path: a folder on the SSD, or one per SSD: tensors go to them in turn. Nothing is left in it.
            granularity: ``saved_tensors``: everything that forward saves. ``layer_inputs``: the inputs of transformer
                layers, which are recomputed in backward; needs ``model``.
            min_tensor_bytes: smaller storages stay in memory.
            keep_resident: the share of bytes of the largest forward so far that stays in memory, the last saved ones,
                besides the buffers and what is just being written: 0 offloads everything;
                ``auto`` as much as needed for backward not to wait, planned after the first forward and backward, and
                again when the disk's speed changes by more than 20 %.
            backend: ``auto`` measures those that are there and takes the fastest.
            num_lanes: threads, and so transfers at a time; at most 64.
            buffer_bytes: for what is read ahead, and for what is copied before it is written. With CUDA this much
                pinned memory, and as much of the GPU's. None: a tenth of what a forward saves, and at least three of
                its tensors.
            host_memory_bytes: a tier between: this much is kept in (with CUDA pinned) host memory and not written.
            capacity_bytes: of the slab, reserved at once. None: half of the free space divided by the process ranks of
                the machine, cut down to twice the need after the first backward.
            io_timeout: seconds after which a read that was not answered is an error.
            rated_tbw: terabytes that the drives may be written with over their life, for ``stats().drive_life_years``.
                This and the two below are of the drives; each process rank of the machine counts on its share.
            drive_bytes: capacity of the drives; default: of the filesystems.
            max_drive_writes_per_day: more is not written than this many times ``drive_bytes`` a day; the rest stays in
                memory.
            model: its parameters and buffers are known from the start; ``layer_inputs`` makes its layers recompute.
            layers: what ``layer_inputs`` recomputes; default the model's stacks of layers.

        Raises:
            TypeError, ValueError: an argument is of another type, or out of range.
            OffloadSpaceError: there is no room for the slab.
            OffloadError: the path or the backend cannot be used.
        """
        check_arguments(
            {
                "min_tensor_bytes": min_tensor_bytes,
                "num_lanes": num_lanes,
                "buffer_bytes": buffer_bytes,
                "host_memory_bytes": host_memory_bytes,
                "capacity_bytes": capacity_bytes,
                "io_timeout": io_timeout,
                "rated_tbw": rated_tbw,
                "drive_bytes": drive_bytes,
                "max_drive_writes_per_day": max_drive_writes_per_day,
            },
            granularity=granularity,
            keep_resident=keep_resident,
            backend=backend,
            model=model,
            layers=layers,
        )
        folders = to_folders(path)
        self.granularity: Granularity = granularity
        self._buffer_bytes = buffer_bytes
        self._min_bytes, self._keep_resident = min_tensor_bytes, keep_resident
        self._may_resize = capacity_bytes is None
        # Before the slab takes what may be the last room.
        self._backend, self._speed = _choose_backend(backend, folders, io_timeout)
        store = _reserve(folders, capacity_bytes)
        try:
            _warn_of_page_cache(store)
            # Each rank of the machine has its share of the drive.
            ranks = _local_ranks()
            self._endurance = Endurance(
                drive_bytes=(drive_bytes or _drive_bytes(folders)) / ranks,
                rated_tbw=rated_tbw / ranks if rated_tbw is not None else None,
                max_drive_writes_per_day=max_drive_writes_per_day,
            )
            self._transport = Transport(
                self._backend,
                store,
                lanes=num_lanes,
                buffer_bytes=buffer_bytes,
                host_memory_bytes=host_memory_bytes,
                io_timeout=io_timeout,
            )
        except BaseException:
            store.close()
            raise
        self._local = threading.local()
        self._graphs: list[ForwardGraph] = []
        self._forwards, self._previous_began, self._period = 0, 0.0, 0.0
        # When, which share of the bytes, and at which speed.
        self._planned: tuple[int, float, Speed] | None = None
        self._largest = 0
        self._trust = 1.0
        self._counted = (0, 0.0, 0, 0.0)
        self._recomputed = None
        if model is not None:
            for tensor in (*model.parameters(), *model.buffers()):
                mark_parameter(tensor)
            if granularity == "layer_inputs":
                try:
                    self._recomputed = RecomputedLayers(model, layers)
                except BaseException:
                    self._transport.close()
                    raise
        self._closed = False

    def __enter__(self) -> "ActivationOffload":
        if self._closed:
            raise OffloadError("this ActivationOffload was closed")
        self._endurance.start()
        budget = self._next_budget()
        graph = ForwardGraph(
            self._transport,
            min_bytes=self._min_bytes,
            budget=budget,
            only_marked=self.granularity == "layer_inputs",
        )
        self._graphs = [*self._graphs[-3:], graph]
        hooks = saved_tensors_hooks(_untraced(graph.pack), _untraced(graph.unpack))
        hooks.__enter__()
        stack = self._local.__dict__.setdefault("stack", [])
        stack.append(hooks)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._local.stack.pop().__exit__(*exception)

    def _next_budget(self) -> float:
        """Bytes that the coming forward may write."""
        now = time.perf_counter()
        if self._forwards:
            self._period = now - self._previous_began
        self._previous_began = now
        self._forwards += 1
        self._measure_speed()
        self._fit_capacity()
        # Inputs may be short now and long the next time.
        self._largest = max([self._largest, *(graph.offered for graph in self._graphs)])
        budget = math.inf
        profiled = next((graph for graph in reversed(self._graphs) if graph.is_profiled), None)
        if profiled is not None and self._keep_resident == "auto":
            budget = self._plan(profiled)
        elif self._keep_resident == 1:
            budget = 0
        elif profiled is not None and self._keep_resident:
            assert not isinstance(self._keep_resident, str)
            budget = (1 - self._keep_resident) * self._largest
        allowance = self._endurance.allowance(self._transport.writes.bytes, self._period)
        return budget if allowance is None else min(budget, allowance)

    def _plan(self, graph: ForwardGraph) -> float:
        """What the disk can take and give back unnoticed, from the latest forward and backward."""
        duration = time.perf_counter() - graph.began
        self._trust = max(0.2, self._trust * 0.9) if graph.stall > 0.01 * duration else min(1.0, self._trust * 1.02)
        made_at, share, speed = self._planned or (-math.inf, 0.0, self._speed)
        due = self._forwards <= _FIRST_FORWARDS or self._forwards - made_at >= _PLAN_INTERVAL
        if due or _differs(speed.write, self._speed.write) or _differs(speed.read, self._speed.read):
            absorbable = absorbable_bytes(
                graph.profile(),
                write_bandwidth=self._speed.write,
                read_bandwidth=self._speed.read,
                window=self._buffer_bytes or graph.window,
            )
            share = absorbable / graph.offered
            self._planned = (self._forwards, share, self._speed)
        share *= self._trust
        least = max(_PROBE_BYTES, graph.first_size)
        if share * self._largest < least and self._forwards % _PROBE_INTERVAL == 0:
            return least
        return share * self._largest if share < 1 else math.inf

    def _measure_speed(self) -> None:
        """Update the bandwidths from what the lanes moved since the last time."""
        writes, reads = self._transport.writes, self._transport.reads
        written, write_seconds, read, read_seconds = self._counted
        speed = [self._speed.write, self._speed.read]
        for place, (nbytes, seconds) in enumerate(
            (
                (writes.bytes - written, writes.seconds - write_seconds),
                (reads.bytes - read, reads.seconds - read_seconds),
            )
        ):
            if nbytes >= _ENOUGH_TO_MEASURE and seconds > 0:
                speed[place] = 0.5 * speed[place] + 0.5 * nbytes / seconds
        self._speed = Speed(*speed)
        self._counted = (writes.bytes, writes.seconds, reads.bytes, reads.seconds)

    def _fit_capacity(self) -> None:
        """Cut an automatic reservation down to the need, or raise it, while nothing is in the slab."""
        store, need = self._transport.store, 2 * self._transport.offered.peak
        too_large = self._forwards == 3 and store.capacity > max(need, _LEAST_CAPACITY)
        if self._may_resize and (too_large or (self._transport.full and store.capacity < need)):
            with suppress(OffloadError):
                if store.resize_unused(max(need, _LEAST_CAPACITY)):
                    self._transport.full = 0

    def stats(self) -> OffloadStats:
        """What was saved, moved and waited for."""
        transport = self._transport
        transport.settle()
        written = transport.writes.bytes
        budget = self._planned[1] * self._trust * self._largest if self._planned is not None else None
        return OffloadStats(
            backend=self._backend.name,
            saved=transport.saved.now,
            saved_peak=transport.saved.peak,
            resident=transport.resident.now,
            resident_peak=transport.resident.peak,
            capacity=transport.store.capacity,
            written=written,
            read=transport.reads.bytes,
            io_stall=transport.stall,
            forwarded=transport.forwarded,
            failed_writes=transport.failed_writes,
            full=transport.full,
            offload_budget=int(budget) if budget is not None else None,
            write_bandwidth=self._speed.write,
            read_bandwidth=self._speed.read,
            written_per_day=self._endurance.per_day(written),
            drive_writes_per_day=self._endurance.drive_writes_per_day(written),
            drive_life_years=self._endurance.life_years(written),
        )

    def reset_peaks(self) -> None:
        """Let ``saved_peak`` and ``resident_peak`` start again from the present values."""
        self._transport.settle()
        self._transport.saved.reset_peak()
        self._transport.resident.reset_peak()

    def close(self) -> None:
        """Stop the threads and give the disk space back. A backward still to come will raise ``OffloadError``."""
        if not self._closed:
            self._closed = True
            if self._recomputed is not None:
                self._recomputed.restore()
            self._transport.close()

    def __reduce__(self) -> Any:
        raise TypeError("an ActivationOffload cannot be copied or pickled: it has threads and disk space of its own")


def _untraced(hook: Any) -> Any:
    """Keep ``torch.compile``, where it is in use, from compiling the hooks themselves."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    return dynamo.disable(hook) if dynamo is not None else hook


def check_room(path: Any, capacity_bytes: int | None) -> None:
    """Raise what :class:`ActivationOffload` would for these folders: ``OffloadError`` or ``OffloadSpaceError``."""
    _reserve(to_folders(path), capacity_bytes).close()


def _reserve(folders: Sequence[Path], capacity_bytes: int | None) -> SlabStore:
    return SlabStore(folders, capacity_bytes if capacity_bytes is not None else _default_capacity(folders))


def _choose_backend(
    backend: BackendName | IOBackend, folders: Sequence[Path], timeout: float
) -> tuple[IOBackend, Speed]:
    """The backend, and its speed over all folders together."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if isinstance(backend, str):
            chosen, speed = make_backend(backend, folders[0], device, timeout=timeout)
        else:
            chosen, speed = backend, measure(backend, folders[0], timeout=timeout)
    except (OSError, ImportError, RuntimeError) as error:
        if isinstance(error, OffloadError):
            raise
        raise OffloadError(f"backend: {backend} cannot be used on {folders[0]}: {error}") from error
    return chosen, Speed(speed.write * len(folders), speed.read * len(folders))


def _default_capacity(folders: Sequence[Path]) -> int:
    ranks = _local_ranks()
    smallest = min(map(available_bytes, folders))
    capacity = smallest * len(folders) // (2 * ranks)
    if capacity < _LEAST_CAPACITY:
        raise OffloadSpaceError(
            f"{folders[0]}: {smallest:,} bytes are free; at least {2 * ranks * _LEAST_CAPACITY:,} are needed"
        )
    return round_up(capacity)


def _local_ranks() -> int:
    """Process ranks on this machine, as torchrun, DeepSpeed's launcher or MPI say."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if name in os.environ:
            return max(1, int(os.environ[name]))
    return 1


def _drive_bytes(folders: Sequence[Path]) -> int:
    sizes = {}
    for folder in folders:
        status = os.statvfs(folder)
        sizes[os.stat(folder).st_dev] = status.f_blocks * status.f_frsize
    return sum(sizes.values())


def _warn_of_page_cache(store: SlabStore) -> None:
    for file in store.files:
        if not file.is_direct:
            warnings.warn(
                f"{file.folder}: this filesystem has no direct I/O; activations will pass through the page cache and"
                " take its memory",
                stacklevel=4,
            )


def _differs(before: float, now: float) -> bool:
    return abs(now - before) > _SPEED_CHANGE * before
