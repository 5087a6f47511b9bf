"""``ActivationOffload``: what a training loop uses."""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import record_function

from .backends.choice import choose_backend
from .backends.probe import Speed
from .codecs import CodecName, make_codec
from .controller import Controller
from .debug_state import DebugState, debug_state
from .errors import OffloadError
from .options import Folder, Granularity, OffloadOptions, check_model, keywords
from .saving.encoding import Encoding
from .saving.graph import ForwardGraph, keep_in_memory
from .saving.places import Places
from .saving.recompute import RecomputedLayers
from .schedule import MicroBatch, Schedule, Step
from .stats import Endurance, OffloadStats
from .storage.filesystem import to_folders, total_bytes
from .storage.reservation import local_process_ranks, reserve, warn_of_page_cache
from .transfer.memory_only import MemoryOnly
from .transfer.transport import Transport

# The latest forwards, of which plans are made.
_NUM_KNOWN = 4


class ActivationOffload:
    """Keeps what forward saves for backward on NVMe instead of in memory, bit for bit; or in fewer bits, by a codec.

    Wrap the forward; backward needs nothing::

        offload = ActivationOffload("/scratch")
        for batch in batches:
            with offload:
                loss = model(**batch).loss
            loss.backward()
            ...
        offload.close()

    Saved tensors are written while forward goes on, and read back in reverse order while backward does. They are
    dropped when autograd drops them. Parameters are left alone. With a ``codec`` activations are encoded before that;
    with ``path=None`` they stay in memory then. Works for CPU and CUDA tensors, on any number of
    threads and with any number of forwards whose backward is still to come. Not fork-safe: make it after forking.

    After SSDTrain (Wu et al., 2024, arXiv 2408.10013): the idea of overlapping the I/O with compute and of forwarding
    what is asked for while it is still being written. The adaptive amount is planned from measured times (see
    :func:`~.planner.absorbable_bytes`), not from that paper's model.
    """

    __signature__ = keywords()

    def __init__(
        self,
        path: Folder | Sequence[Folder] | None,
        *,
        model: nn.Module | None = None,
        layers: Sequence[nn.Module] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            path: a folder on the SSD, or one per SSD: tensors go to them in turn. Nothing is left in it. None: no disk.
            model: its parameters and buffers are known from the start; ``granularity="layer_inputs"`` makes its layers
                recompute, and a codec follows its modules. Not wrapped, and the one that is called.
            layers: what ``layer_inputs`` recomputes; default the model's stacks of layers.
            options: the fields of :class:`~.options.OffloadOptions`.

        Raises:
            TypeError, ValueError: an option is unknown, of another type, or out of range.
            OffloadSpaceError: there is no room for the slab.
            OffloadError: the path or the backend cannot be used.
        """
        chosen = OffloadOptions(path=path, **options)
        check_model(chosen.granularity, chosen.codec, model, layers)
        self.granularity: Granularity = chosen.granularity
        self.codec: CodecName = chosen.codec
        self._min_bytes = chosen.min_tensor_bytes
        codec, self._encoding = make_codec(chosen.codec), None
        if codec is not None and model is not None:
            self._encoding = Encoding(codec, Places(model, chosen.codec_modules))
        self._transport, self._controller, self._endurance = _start(chosen)
        self._local = threading.local()
        self._graphs: list[ForwardGraph] = []
        self._step: Step | None = None
        self._recomputed = None
        if model is not None:
            for tensor in (*model.parameters(), *model.buffers()):
                keep_in_memory(tensor)
            if self.granularity == "layer_inputs":
                try:
                    self._recomputed = RecomputedLayers(model, layers)
                except BaseException:
                    self._transport.close()
                    raise
        self._closed = False

    def __enter__(self) -> "ActivationOffload":
        self._refuse_if_closed()
        budget = self._controller.next_budget(self._graphs) if self._controller is not None else 0.0
        self._enter(budget, num_known=_NUM_KNOWN)
        return self

    def begin_step(self, schedule: Schedule) -> None:
        """A step begins whose forwards and backwards come in a known order, as those of a pipeline do.

        Each of its forwards goes into :meth:`forward` instead of ``with offload``. How much of it is written is planned
        for its chunk of the model and its place in the order, from what the step before took; and what the next
        backward asks for first is read while the passes before it go on.
        """
        self._refuse_if_closed()
        if self._controller is not None:
            self._controller.begin_step(schedule, self._step)
        self._step = Step(schedule)

    @contextmanager
    def forward(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Offload what one forward of the step saves.

        Raises:
            OffloadError: it is another one's turn in the schedule.
        """
        self._refuse_if_closed()
        step = self._step
        if step is None:
            raise OffloadError("activation offload: expected begin_step before a forward of a schedule")
        step.check(micro_batch)
        budget = self._controller.budget_of(step.schedule, micro_batch) if self._controller is not None else 0.0
        graph = self._enter(budget, num_known=max(_NUM_KNOWN, len(step.schedule.forwards)))
        try:
            step.add(micro_batch, graph)
            yield
        finally:
            self._local.stack.pop().__exit__(None, None, None)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise OffloadError("this ActivationOffload was closed")

    def _enter(self, budget: float, *, num_known: int) -> ForwardGraph:
        """Set the hooks of a forward."""
        only_marked, encoding = self.granularity == "layer_inputs", None
        if self._encoding is not None:
            self._say_if_nothing_is_encoded(self._encoding)
            encoding = self._encoding.begin_forward(
                self._transport.counters, min_bytes=self._min_bytes, only_marked=only_marked
            )
        graph = ForwardGraph(
            self._transport, min_bytes=self._min_bytes, budget=budget, only_marked=only_marked, encoding=encoding
        )
        self._graphs = [*self._graphs[1 - num_known :], graph]
        hooks = saved_tensors_hooks(_untraced(_named(graph.pack, "save")), _untraced(_named(graph.unpack, "take back")))
        hooks.__enter__()
        stack = self._local.__dict__.setdefault("stack", [])
        stack.append(hooks)
        return graph

    def __exit__(self, *exception: Any) -> None:
        self._local.stack.pop().__exit__(*exception)

    def _say_if_nothing_is_encoded(self, encoding: Encoding) -> None:
        if encoding.begun_here == 1 and self._transport.counters.encoded_from == 0:
            warnings.warn(
                "activation offload: the codec has encoded nothing in the first forward: the modules that codec_modules"
                f" names saved no activation of {self._min_bytes:,} bytes (min_tensor_bytes) or more; under activation"
                " checkpointing what is saved is saved outside of the layers",
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a codec goes on from after a restart, for a checkpoint of this process rank: its number of forwards and
        tensors by name. Empty without a codec.
        """
        return self._encoding.state_dict() if self._encoding is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; a codec that is given nothing starts anew."""
        if self._encoding is not None and state:
            self._encoding.load_state_dict(state)

    def stats(self) -> OffloadStats:
        """What was saved, moved and waited for."""
        self._transport.settle()
        counters, controller, endurance = self._transport.counters, self._controller, self._endurance
        speed, written = controller.speed if controller is not None else Speed(0.0, 0.0), counters.written.bytes
        return OffloadStats(
            backend=self._transport.name,
            saved=counters.saved.now,
            saved_peak=counters.saved.peak,
            resident=counters.resident.now,
            resident_peak=counters.resident.peak,
            capacity=self._transport.capacity,
            written=written,
            read=counters.read.bytes,
            io_stall=counters.stall,
            forwarded=counters.forwarded,
            failed_writes=counters.failed_writes,
            full=counters.full,
            encoded_from=counters.encoded_from,
            encoded_to=counters.encoded_to,
            offload_budget=controller.planned_budget if controller is not None else 0,
            unplanned=controller.unplanned if controller is not None else 0,
            write_bandwidth=speed.write,
            read_bandwidth=speed.read,
            written_per_day=endurance.per_day(written),
            drive_writes_per_day=endurance.drive_writes_per_day(written),
            drive_life_years=endurance.life_years(written),
        )

    def debug_state(self) -> DebugState:
        """What is held and under way just now, in more detail than a run needs."""
        return debug_state(self._transport, self._graphs)

    def reset_peaks(self) -> None:
        """Let ``saved_peak`` and ``resident_peak`` start again from the present values."""
        self._transport.settle()
        self._transport.counters.saved.reset_peak()
        self._transport.counters.resident.reset_peak()

    def close(self) -> None:
        """Stop the threads and give the disk space back. A backward still to come will raise ``OffloadError``."""
        if not self._closed:
            self._closed = True
            if self._encoding is not None:
                self._encoding.places.remove()
            if self._recomputed is not None:
                self._recomputed.restore()
            self._transport.close()

    def __reduce__(self) -> Any:
        raise TypeError("an ActivationOffload cannot be copied or pickled: it has threads and disk space of its own")


def _start(options: OffloadOptions) -> tuple[Transport | MemoryOnly, Controller | None, Endurance]:
    """Threads over reserved disk space, and what decides how much goes there; or neither, without a path."""
    if options.path is None:
        return MemoryOnly(), None, Endurance(drive_bytes=1.0, rated_tbw=None, max_drive_writes_per_day=None)
    folders = to_folders(options.path)
    # Before the slab takes what may be the last room.
    backend, speed = choose_backend(options.backend, folders, timeout=options.io_timeout)
    store = reserve(folders, options.capacity_bytes)
    try:
        warn_of_page_cache(store)
        # Each process rank of the machine has its share of the drive.
        ranks = local_process_ranks()
        endurance = Endurance(
            drive_bytes=(options.drive_bytes or total_bytes(folders)) / ranks,
            rated_tbw=options.rated_tbw / ranks if options.rated_tbw is not None else None,
            max_drive_writes_per_day=options.max_drive_writes_per_day,
        )
        transport = Transport(
            backend,
            store,
            num_lanes=options.num_lanes,
            buffer_bytes=options.buffer_bytes,
            host_memory_bytes=options.host_memory_bytes,
            io_timeout=options.io_timeout,
        )
    except BaseException:
        store.close()
        raise
    controller = Controller(
        transport,
        speed,
        endurance,
        keep_resident=options.keep_resident,
        buffer_bytes=options.buffer_bytes,
        may_resize=options.capacity_bytes is None,
    )
    return transport, controller, endurance


def _named(hook: Callable[[Any], Any], what: str) -> Callable[[Any], Any]:
    """The hook with a name in the trace of a forward that is being profiled."""
    if not torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
        return hook
    return record_function(f"narrowgauge::offload, {what}")(hook)


def _untraced(hook: Any) -> Any:
    """Keep ``torch.compile``, where it is in use, from compiling the hooks themselves."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    return dynamo.disable(hook) if dynamo is not None else hook


def check_room(path: Any, capacity_bytes: int | None) -> None:
    """Raise what :class:`ActivationOffload` would for these folders: ``OffloadError`` or ``OffloadSpaceError``."""
    reserve(to_folders(path), capacity_bytes).close()
