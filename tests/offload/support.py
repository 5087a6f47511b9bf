"""Running a computation with and without offload, and waiting for what the lanes do in the background."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from narrowgauge.offload import ActivationOffload
from narrowgauge.offload.backends.threads import ThreadsBackend, ThreadsLane
from narrowgauge.offload.storage.slab import ALIGNMENT, round_up

Loss = Callable[..., Tensor]
_PATIENCE = 20.0


def new_offload(path: Path | Sequence[Path], **options: Any) -> ActivationOffload:
    """Everything of at least a byte is written, on any machine alike."""
    chosen = {"keep_resident": 0.0, "min_tensor_bytes": 1, "backend": "threads", "capacity_bytes": 64 << 20}
    return ActivationOffload(path, **{**chosen, **options})  # type: ignore[arg-type]


class GatedBackend(ThreadsBackend):
    """Threads whose writes wait for a gate: a write that is not done yet, for as long as a test needs it."""

    def __init__(self) -> None:
        self.gate, self.begun = Event(), Event()
        self.gate.set()

    def lane(self) -> "GatedLane":
        return GatedLane(self)


class GatedLane(ThreadsLane):
    def __init__(self, backend: GatedBackend) -> None:
        self._backend = backend

    def write(self, fd: int, offset: int, buffer: Tensor) -> None:
        if not self._backend.gate.is_set():
            self._backend.begun.set()
        self._backend.gate.wait()
        super().write(fd, offset, buffer)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.0005)


def settle(offload: ActivationOffload) -> None:
    """Wait until no write is queued or under way, so that backward has to read."""
    wait_until(lambda: offload.debug_state().writes_pending == 0, "a write is not done")


def rest(offload: ActivationOffload) -> None:
    """Wait until no lane is at work nor about to begin a read.

    What a lane works on is still held, and counted, although autograd let go of it.
    """

    def at_rest() -> bool:
        state = offload.debug_state()
        return state.reads_pending == state.lanes_busy == 0

    wait_until(at_rest, "a lane is at work")


def level(offload: ActivationOffload) -> tuple[int, int, int]:
    """What there is of anything that must come back to 0."""
    state = offload.debug_state()
    return state.slab_bytes, state.saved, state.resident


def assert_nothing_left(offload: ActivationOffload) -> None:
    """Autograd has let go of everything; a lane may need a moment to see that a queued transfer is for nobody."""
    gc.collect()
    try:
        wait_until(lambda: level(offload) == (0, 0, 0), "")
    except TimeoutError:
        raise AssertionError(f"left in the slab, saved, resident: {level(offload)}") from None


@dataclass(frozen=True)
class Traffic:
    """Bytes of one forward and backward. ``saved`` and ``kept`` are those after forward and the writes."""

    saved: int
    kept: int
    written: int
    read: int
    forwarded: int

    def assert_written_and_read(self, nbytes: int, storages: int) -> None:
        """All of these storages went to disk and came back once, whole blocks at a time."""
        assert self.saved == nbytes
        assert self.kept == 0
        assert round_up(nbytes) <= self.written <= round_up(nbytes) + 2 * storages * ALIGNMENT
        assert self.read == self.written
        assert self.forwarded == 0

    def assert_everything_moved(self) -> None:
        """What was saved went to disk and came back, except what the test itself still holds."""
        assert self.saved > 0
        assert self.written >= self.saved
        assert self.kept == 0
        assert self.read > 0


def copies(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]


def grads_of(leaves: Sequence[Tensor]) -> list[Tensor | None]:
    return [leaf.grad for leaf in leaves]


def assert_same(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            assert one.dtype is other.dtype
            assert one.shape == other.shape
            if not torch.equal(one, other):
                raise AssertionError(f"differs by up to {(one - other).abs().max()}")


def compare(
    offload: ActivationOffload, function: Loss, *leaves: Tensor, wait: bool = True, wait_for_buffers: bool = False
) -> Traffic:
    """Loss and gradients of ``function(*leaves)`` are the same bits with offload as without; returns what moved.

    Args:
        wait: for the lanes before forward, and for the writes before backward. Without it the lanes may still count
            tensors of an earlier call, so that ``saved`` and ``kept`` mean nothing.
        wait_for_buffers: until all are free, before backward. Threads of DeepSpeed's aio hold theirs for a moment after
            they have said that it is written.
    """
    plain = copies(leaves)
    wanted = function(*plain)
    wanted.backward()
    if wait:
        rest(offload)
    before = offload.stats()
    used = copies(leaves)
    with offload:
        loss = function(*used)
    if wait:
        settle(offload)
    if wait_for_buffers:
        wait_until(lambda: offload.debug_state().buffer_bytes == 0, "a buffer is not free")
    middle = offload.stats()
    loss.backward()
    after = offload.stats()
    assert_same([loss.detach(), *grads_of(used)], [wanted.detach(), *grads_of(plain)])
    return Traffic(
        saved=middle.saved - before.saved,
        kept=middle.resident - before.resident,
        written=after.written - before.written,
        read=after.read - before.read,
        forwarded=after.forwarded - before.forwarded,
    )
