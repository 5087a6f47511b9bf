"""Disks that fail on cue, training runs to let them fail under, and filesystems small enough to fill."""

import contextlib
import ctypes
import functools
import logging
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowgauge.offload import ActivationOffload
from narrowgauge.offload.backends import Lane
from narrowgauge.offload.backends.threads import ThreadsBackend
from narrowgauge.offload.debug_state import StoredTensor
from tests.support.command import ROOT, environment
from tests.support.models import Block

# What a fault does with the n-th transfer since the backend was armed: carry it out, not, late, or raise.
Fault = Callable[[int, Callable[[], None], int], None]
Loss = Callable[[nn.Module, int], Tensor]
Result = TypeVar("Result")


class FaultyBackend:
    """The real threads backend with faults in between, from :meth:`arm` on.

    With ``in_place`` off, CPU tensors are staged in buffers as CUDA tensors are.
    """

    name = "faulty"
    moves_device_memory = False

    def __init__(self, *, write: Fault | None = None, read: Fault | None = None, in_place: bool = True) -> None:
        self.write_fault, self.read_fault = write, read
        self.writes_in_place = in_place
        self._real = ThreadsBackend()
        self._lock = threading.Lock()
        self._armed = False
        self.writes = self.reads = 0

    def arm(self, *, write: Fault | None = None, read: Fault | None = None) -> None:
        """Count from 0 and let the faults happen; given ones replace those of the constructor."""
        with self._lock:
            self.write_fault, self.read_fault = write or self.write_fault, read or self.read_fault
            self.writes = self.reads = 0
            self._armed = True

    def clear(self) -> None:
        """The disk is well again."""
        self._armed = False

    def lane(self) -> "FaultyLane":
        return FaultyLane(self, self._real.lane())

    def new_buffer(self, nbytes: int) -> Tensor:
        return self._real.new_buffer(nbytes)

    def free_buffer(self, buffer: Tensor) -> None:
        self._real.free_buffer(buffer)

    def do_write(self, proceed: Callable[[], None], nbytes: int) -> None:
        with self._lock:
            number, fault = self.writes, self.write_fault if self._armed else None
            self.writes += 1
        proceed() if fault is None else fault(number, proceed, nbytes)

    def do_read(self, proceed: Callable[[], None], nbytes: int) -> None:
        with self._lock:
            number, fault = self.reads, self.read_fault if self._armed else None
            self.reads += 1
        proceed() if fault is None else fault(number, proceed, nbytes)


class FaultyLane:
    def __init__(self, backend: FaultyBackend, real: Lane) -> None:
        self._backend, self._real = backend, real

    def write(self, fd: int, offset: int, buffer: Tensor) -> None:
        self._backend.do_write(lambda: self._real.write(fd, offset, buffer), buffer.nbytes)

    def read(self, fd: int, offset: int, buffer: Tensor) -> None:
        self._backend.do_read(lambda: self._real.read(fd, offset, buffer), buffer.nbytes)

    def close(self) -> None:
        self._real.close()


# Faults.


def failing(error: type[BaseException] | int, at: Iterable[int] | None = None) -> Fault:
    """Raise such an error, or ``OSError`` with that number, on the given transfers; on all without ``at``."""
    numbers = None if at is None else set(at)

    def fault(number: int, proceed: Callable[[], None], nbytes: int) -> None:
        if numbers is None or number in numbers:
            # A new one each time: an exception that is kept keeps what its frames refer to.
            raise OSError(error, os.strerror(error)) if isinstance(error, int) else error("odd")
        proceed()

    return fault


def lost(at: Iterable[int] | None = None) -> Fault:
    """Reported as done, but not done."""
    numbers = None if at is None else set(at)

    def fault(number: int, proceed: Callable[[], None], nbytes: int) -> None:
        if numbers is not None and number not in numbers:
            proceed()

    return fault


def delayed(seed: int, longest: float) -> Fault:
    """Each transfer takes a random time more, before or after the bytes move; most are short."""
    dice, lock = random.Random(seed), threading.Lock()

    def fault(number: int, proceed: Callable[[], None], nbytes: int) -> None:
        with lock:
            before, after = longest * dice.random() ** 4, longest * dice.random() ** 4
        time.sleep(before)
        proceed()
        time.sleep(after)

    return fault


def limited(bytes_per_second: float) -> Fault:
    """One transfer at a time, at that rate."""
    lock = threading.Lock()

    def fault(number: int, proceed: Callable[[], None], nbytes: int) -> None:
        with lock:
            time.sleep(nbytes / bytes_per_second)
            proceed()

    return fault


def hanging(until: threading.Event, at: Iterable[int] | None = None) -> Fault:
    """No answer until the event is set."""
    numbers = None if at is None else set(at)

    def fault(number: int, proceed: Callable[[], None], nbytes: int) -> None:
        if numbers is None or number in numbers:
            until.wait(60)
        proceed()

    return fault


def moving_at_most(monkeypatch: pytest.MonkeyPatch, call: str, most: int, *, when: threading.Event) -> None:
    """Let ``pwritev`` or ``preadv`` move fewer bytes than they were asked for, as system calls may."""
    real = getattr(os, call)

    def short(fd: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        if not when.is_set():
            return real(fd, buffers, offset, *flags)
        return real(fd, [buffers[0][:most]], offset, *flags) if most else 0

    monkeypatch.setattr(f"narrowgauge.offload.backends.threads.os.{call}", short)


# Training.


def check(condition: bool, what: str) -> None:
    """An assertion that also holds under ``python -O``."""
    if not condition:
        raise AssertionError(what)


class Chain(nn.Module):
    """Linear layers and activations in a row."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x)) * 1.5
        return x


class Diamond(nn.Module):
    """One tensor is saved by several branches, some through views, and joined again."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            trunk = self.stem(x).tanh()
            half = trunk.shape[-1] // 2
            joined = torch.cat([self.left(trunk)[..., half:], self.right(trunk.sin())[..., :half]], dim=-1)
            x = trunk * joined.sigmoid() + joined * trunk.exp() + x
        return x


class Attention(nn.Module):
    """Two transformer blocks."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(width, 2 * width, True), Block(width, 2 * width, False))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Recurrent(nn.Module):
    """A long chain of small tensors with a shared weight."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, width)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        states = []
        for moment in range(x.shape[1]):
            state = self.cell(x[:, moment], state)
            states.append(state)
        return torch.stack(states, dim=1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "diamond": Diamond,
    "attention": Attention,
    "recurrent": Recurrent,
}


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 16, 64, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


class Training:
    """A small deterministic training run, step by step; the same seed gives the same gradients, bit for bit."""

    def __init__(self, kind: str = "chain", offload: ActivationOffload | None = None, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model, self.offload, self.at = MODELS[kind](), offload, 0

    def forward(self) -> Tensor:
        with self.offload if self.offload is not None else nullcontext():
            return loss_of(self.model, self.at)

    def finish(self) -> list[Tensor]:
        """The gradients, and on to the next step."""
        found: list[Tensor] = []
        with torch.no_grad():
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                found.append(parameter.grad.clone())
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        self.at += 1
        return found

    def give_up(self) -> None:
        """After an error in backward: drop what there is of gradients, so that the step can be done again."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def step(self, *, settled: bool = False, before_backward: Callable[[], Any] | None = None) -> list[Tensor]:
        """
        Args:
            settled: wait for the writes before backward, so that it has to read.
        """
        loss = self.forward()
        if settled:
            assert self.offload is not None
            settle(self.offload)
        if before_backward is not None:
            before_backward()
        loss.backward()
        return self.finish()


class Twin:
    """A run with offload, compared after each step with the same run without."""

    def __init__(self, offload: ActivationOffload, kind: str = "chain", *, seed: int = 0) -> None:
        self.offload = offload
        self.run, self.reference = Training(kind, offload, seed=seed), Training(kind, seed=seed)

    def step(self, *, settled: bool = False, before_backward: Callable[[], Any] | None = None) -> None:
        """Both do a step; their gradients are the same bits."""
        found = self.run.step(settled=settled, before_backward=before_backward)
        self.compare(found)

    def step_fails(
        self,
        kind: type[BaseException],
        match: str = "",
        *,
        settled: bool = True,
        before_backward: Callable[[], Any] | None = None,
    ) -> None:
        """Backward raises; the step is not counted as done and can be done again."""
        # Not pytest.raises, which would keep the error, its frames, and in them the graph and its buffers.
        message = None
        try:
            self.run.step(settled=settled, before_backward=before_backward)
        except kind as error:
            message = str(error)
        check(message is not None, f"{kind.__name__} was not raised")
        check(re.search(match, message or "") is not None, message or "")
        self.run.give_up()
        # Autograd's queue of this thread keeps nodes of the failed backward until the next one comes.
        torch.zeros((), requires_grad=True).mul(1).backward()

    def compare(self, found: list[Tensor]) -> None:
        for number, (one, other) in enumerate(zip(found, self.reference.step(), strict=True)):
            check(torch.equal(one, other), f"gradient {number} of step {self.reference.at} differs")


# Looking at the insides.


def settle(offload: ActivationOffload, seconds: float = 20.0) -> None:
    """Wait until each write of the latest forwards is done."""
    deadline = time.monotonic() + seconds
    while offload.debug_state().writes_pending:
        if time.monotonic() > deadline:
            raise TimeoutError("a write is not done")
        time.sleep(0.0005)


def through_page_cache(fd: int) -> int:
    """The same file once more, without direct I/O and its rules of alignment."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR)


def flip_bit(stored: StoredTensor, byte: int) -> None:
    """Of a tensor's bytes in the slab, or of those around them, beneath everything."""
    fd = through_page_cache(stored.fd)
    try:
        value = os.pread(fd, 1, stored.offset + byte)[0]
        os.pwrite(fd, bytes([value ^ 0x10]), stored.offset + byte)
        os.fsync(fd)
    finally:
        os.close(fd)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


# Time limits.


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """The result of ``call``, made in a thread of its own so that a hang fails the test and not the session."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        frames = sys._current_frames().get(thread.ident or 0)
        place = f"{frames.f_code.co_filename}:{frames.f_lineno}" if frames is not None else "?"
        raise AssertionError(f"hangs after {seconds} s in {place}")
    if errors:
        raise errors[0]
    return results[0]


def deadline(seconds: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test must be done by then."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def limited_test(*args: Any, **kwargs: Any) -> None:
            within(seconds, lambda: test(*args, **kwargs))

        return limited_test

    return decorate


# Filesystems.


class Mounted:
    """A small filesystem in a folder; skips the test where mounting is not permitted."""

    def __init__(self, folder: Path, kind: str, mebibytes: int) -> None:
        self._folder, self._kind, self._size = folder / f"{kind}-{mebibytes}", kind, mebibytes

    def __enter__(self) -> Path:
        self._folder.mkdir()
        if self._kind == "tmpfs":
            libc = ctypes.CDLL(None, use_errno=True)
            target = os.fsencode(self._folder)
            if libc.mount(b"none", target, b"tmpfs", 0, f"size={self._size}m".encode()) != 0:
                pytest.skip(f"mounting tmpfs: {os.strerror(ctypes.get_errno())}")
            return self._folder
        image = self._folder.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(self._size << 20)
        for command in ([f"mkfs.{self._kind}", "-q", "-F", image], ["mount", "-o", "loop", image, self._folder]):
            try:
                done = subprocess.run(  # noqa: S603
                    list(map(str, command)), capture_output=True, text=True, timeout=60, check=False
                )
            except OSError as error:
                pytest.skip(f"{command[0]}: {error}")
            if done.returncode != 0:
                pytest.skip(f"{command[0]}: {done.stderr.strip()}")
        with contextlib.suppress(OSError):
            (self._folder / "lost+found").rmdir()
        return self._folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        subprocess.run(["umount", "--lazy", str(self._folder)], capture_output=True, timeout=60, check=False)  # noqa: S603, S607


# Processes.

KEPT: list[Tensor] = []


def python(call: str, *arguments: Any, **extra: str) -> "subprocess.Popen[str]":
    """Start a function of this module in a process of its own."""
    words = ", ".join(map(repr, arguments))
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", f"from tests.offload.faults import {call}; {call}({words})"],
        env=environment(**extra),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: "subprocess.Popen[str]", seconds: float = 60) -> tuple[int, str, str]:
    """Exit code and output; killed and failed when it takes longer."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"a process hangs after {seconds} s\n{output}\n{errors[-3000:]}") from None
    return process.returncode, output, errors


def say(word: str) -> None:
    """To the process that waits for it."""
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def new_offload(folder: str | Path, **options: Any) -> ActivationOffload:
    """Offload of every byte."""
    chosen = {"keep_resident": 0.0, "min_tensor_bytes": 1, "backend": "threads", "capacity_bytes": 16 << 20}
    return ActivationOffload(folder, **{**chosen, **options})


def train_compared(folder: str, steps: int, kind: str = "attention", capacity: int = 16 << 20) -> None:
    """In a process: train, compare each step, end."""
    offload = new_offload(folder, capacity_bytes=capacity)
    twin = Twin(offload, kind)
    for _ in range(steps):
        twin.step(settled=True)
    check(offload.stats().read > 0, "nothing was read")
    offload.close()
    say("same bits")


def train_for_ever(folder: str, capacity: int) -> None:
    """In a process that is going to be killed."""
    offload = new_offload(folder, capacity_bytes=capacity)
    training = Training("attention", offload)
    while True:
        training.step()
        say("step")


def leave_without_closing(folder: str, hang: bool) -> None:
    """In a process: end while transfers are queued and under way."""
    backend = FaultyBackend(in_place=False)
    offload = new_offload(folder, backend=backend)
    backend.arm(write=hanging(threading.Event()) if hang else limited(1e6))
    loss = Training("attention", offload).forward()
    time.sleep(0.1)
    say(f"left {loss.item() > 0}")


def leave_while_copying(folder: str) -> None:
    """In a process: end while lanes are at work in torch's own code, which must not meet the end of the interpreter."""
    offload = new_offload(folder, backend=FaultyBackend(in_place=False), capacity_bytes=400 << 20, num_lanes=3)
    x = torch.randn(1000, 1000, requires_grad=True)
    with offload:
        y = x
        for _ in range(100):
            y = (y * 1.01).tanh()
    # Alive to the end.
    KEPT.append(y)
    say("left")


def construct(folder: str, user: int) -> None:
    """In a process: as somebody for whom modes count."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    descriptors = open_descriptors()
    try:
        new_offload(folder).close()
        say("no error")
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
    assert open_descriptors() == descriptors


def read_truncated(folder: str, backend: str, flip: bool) -> None:
    """In a process, which the aio extension ends on a short file: the slab loses its bytes before backward."""
    offload = new_offload(folder, backend=backend)
    twin = Twin(offload, "chain")
    twin.step(settled=True)

    def spoil() -> None:
        state = offload.debug_state()
        assert state.stored
        if flip:
            for victim in state.stored:
                flip_bit(victim, 0)
        else:
            os.ftruncate(state.slabs[0].fd, 4096)

    try:
        twin.run.step(settled=True, before_backward=spoil)
        say("no error")
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
    twin.run.give_up()
    os.ftruncate(offload.debug_state().slabs[0].fd, 16 << 20)
    twin.step(settled=True)
    offload.close()
    say("closed")


def write_first_with_aio(folder: str) -> None:
    """In a process: DeepSpeed logs a warning at the first write, and the log gives other threads time to write too."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            time.sleep(0.3)

    logger.addHandler(Slow())
    new_offload(folder, backend="aio", num_lanes=4).close()
    # DeepSpeed's own swapping loads the extension too.
    accelerator: Any = get_accelerator()
    accelerator.create_op_builder("AsyncIOBuilder").load(verbose=False).aio_handle()
    say("written")


def train_on_rank(folder: str, rank: int, port: int, failing_rank: int, wrapped: bool) -> None:
    """In a process: one of two ranks, of which one reads back other bytes than it wrote."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    offload = new_offload(folder)
    torch.manual_seed(0)
    plain = Chain(depth=6)
    model = DistributedDataParallel(plain, bucket_cap_mb=0.02) if wrapped else plain  # pyright: ignore[reportArgumentType]
    for step in range(100):
        with offload:
            loss = loss_of(model, step)
        settle(offload)
        if rank == failing_rank and step == 3:
            stored = offload.debug_state().stored
            flip_bit(stored[len(stored) // 2], 0)
        loss.backward()
        if not wrapped:
            for parameter in plain.parameters():
                dist.all_reduce(parameter.grad)
        plain.zero_grad()
        say(f"step {step}")


def spawn_lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    """What a process says, line by line."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip("\n")
