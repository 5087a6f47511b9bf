"""Whatever the disk does: the gradients are those without offload, bit for bit, or there is one error that says why."""

import errno
import gc
import math
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from narrowgauge.offload import (
    ActivationOffload,
    OffloadCorruptionError,
    OffloadError,
    OffloadIOError,
    OffloadSpaceError,
)
from narrowgauge.offload.backends.aio import is_built
from narrowgauge.offload.backends.base import Lane
from narrowgauge.offload.backends.deepspeed_build import build_folder
from narrowgauge.offload.backends.probe import Speed
from narrowgauge.offload.backends.threads import ThreadsBackend
from narrowgauge.offload.saving.graph import ForwardGraph
from narrowgauge.offload.storage.slab import SlabStore
from narrowgauge.offload.transfer.checksums import checksum_on_device
from narrowgauge.offload.transfer.lanes import Lanes, Transfer
from narrowgauge.offload.transfer.transport import Transport
from tests.offload.faults import (
    MODELS,
    FaultyBackend,
    Mounted,
    Training,
    Twin,
    deadline,
    delayed,
    failing,
    flip_bit,
    free_bytes,
    hanging,
    limited,
    loss_of,
    lost,
    moving_at_most,
    new_offload,
    open_descriptors,
    outcome,
    python,
    settle,
    spawn_lines,
    train_compared,
    within,
)
from tests.offload.support import rest, wait_until
from tests.support.command import free_port

IN_PLACE = pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "staged"])
OffloadMaker = Callable[..., ActivationOffload]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[OffloadMaker]:
    """Offload of every byte, without the measurement of the disk at the start; closed after the test."""
    monkeypatch.setattr("narrowgauge.offload.backends.choice.measure", lambda *_, **__: Speed(1e9, 1e9))
    made: list[ActivationOffload] = []

    def maker(folder: Path, backend: FaultyBackend | None = None, **options: Any) -> ActivationOffload:
        made.append(new_offload(folder, backend=backend or FaultyBackend(), **options))
        return made[-1]

    yield maker
    for offload in made:
        within(30, offload.close)


def lanes_alive(offload: ActivationOffload, lanes: int = 2) -> bool:
    return offload.debug_state().lanes_alive == lanes


def assert_all_given_back(offload: ActivationOffload) -> None:
    """No extent, buffer or count outlives the graphs."""
    until = time.monotonic() + 10
    while True:
        gc.collect()
        state = offload.debug_state()
        if state.is_empty:
            return
        assert time.monotonic() < until, f"left: {state}"
        time.sleep(0.01)


# Writes that fail.


@IN_PLACE
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@deadline(60)
def test_failed_write_keeps_the_tensor_in_memory(
    tmp_path: Path, make: OffloadMaker, number: int, in_place: bool
) -> None:
    backend = FaultyBackend(write=failing(number, at=[2]), in_place=in_place)
    offload = make(tmp_path, backend)
    twin = Twin(offload, "attention")
    twin.step(settled=True)
    backend.arm()
    with pytest.warns(UserWarning, match=re.escape(str(tmp_path)) + ".*stays in memory"):
        twin.step(settled=True)
    assert offload.stats().failed_writes == 1
    before = offload.stats().written
    twin.step(settled=True)
    assert offload.stats().written > before
    assert_all_given_back(offload)


@IN_PLACE
@pytest.mark.parametrize("kind", list(MODELS))
@deadline(60)
def test_after_a_few_failed_writes_nothing_more_is_offloaded(
    tmp_path: Path, make: OffloadMaker, kind: str, in_place: bool
) -> None:
    backend = FaultyBackend(write=failing(errno.EIO), in_place=in_place)
    offload = make(tmp_path, backend)
    twin = Twin(offload, kind)
    backend.arm()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            twin.step(settled=True)
    messages = [str(warning.message) for warning in caught if "cannot write an activation" in str(warning.message)]
    assert len(messages) == 2
    assert messages[-1].endswith("nothing more is offloaded")
    attempts = backend.writes
    twin.step(settled=True)
    assert backend.writes == attempts
    assert offload.stats().written == 0
    assert_all_given_back(offload)


@IN_PLACE
@deadline(60)
def test_warnings_that_are_errors_do_not_stop_anything(tmp_path: Path, make: OffloadMaker, in_place: bool) -> None:
    backend = FaultyBackend(write=failing(errno.EIO, at=[0, 3]), in_place=in_place)
    offload = make(tmp_path, backend)
    twin = Twin(offload)
    backend.arm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            twin.step(settled=True)
    assert lanes_alive(offload)


@pytest.mark.parametrize("kind", list(MODELS))
@deadline(60)
def test_full_slab_keeps_tensors_in_memory(tmp_path: Path, make: OffloadMaker, kind: str) -> None:
    offload = make(tmp_path, capacity_bytes=100_000)
    twin = Twin(offload, kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            twin.step(settled=True)
    (message,) = [str(warning.message) for warning in caught if "no room" in str(warning.message)]
    assert re.search("slab of 102,400 bytes has no room .*capacity_bytes", message)
    assert offload.stats().full > 0
    assert offload.stats().written > 0
    assert_all_given_back(offload)


@IN_PLACE
@deadline(60)
def test_neighbour_changes_while_a_write_is_under_way(tmp_path: Path, make: OffloadMaker, in_place: bool) -> None:
    """Parts of one storage with version counters of their own, as a GRU cell makes them: autograd allows it."""
    answer = threading.Event()
    backend = FaultyBackend(write=hanging(answer, at=[0]), in_place=in_place)
    offload = make(tmp_path, backend)
    backend.arm()

    def loss_with(leaf: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        first, second = leaf.mul(2).unsafe_chunk(2)
        first.sigmoid_()
        meanwhile()
        second.add_(first).sigmoid_()
        return (first.square() * second.exp()).sum()

    def begun() -> None:
        until = time.monotonic() + 10
        while backend.writes == 0:
            assert time.monotonic() < until
            time.sleep(0.001)
        threading.Timer(0.2, answer.set).start()

    plain, used = (torch.linspace(-2, 2, 10_000).requires_grad_() for _ in range(2))
    loss_with(plain, lambda: None).backward()
    with offload:
        loss = loss_with(used, begun)
    settle(offload)
    loss.backward()
    assert plain.grad is not None
    assert used.grad is not None
    assert torch.equal(plain.grad, used.grad)


# System calls that move fewer bytes than asked for.


@pytest.mark.parametrize("most", [4096, 12288, 4096 + 512])
@pytest.mark.parametrize("call", ["pwritev", "preadv"])
@deadline(60)
def test_short_system_calls_are_continued(
    tmp_path: Path, make: OffloadMaker, monkeypatch: pytest.MonkeyPatch, call: str, most: int
) -> None:
    now = threading.Event()
    moving_at_most(monkeypatch, call, most, when=now)
    offload = make(tmp_path)
    twin = Twin(offload, "attention")
    now.set()
    for _ in range(2):
        twin.step(settled=True)
    assert offload.stats().failed_writes == 0
    assert offload.stats().read > 0


@deadline(60)
def test_short_write_to_an_unaligned_place_fails_as_a_write(
    tmp_path: Path, make: OffloadMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Direct I/O cannot be continued there."""
    now = threading.Event()
    moving_at_most(monkeypatch, "pwritev", 1000, when=now)
    offload = make(tmp_path)
    twin = Twin(offload)
    now.set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            twin.step(settled=True)


@deadline(60)
def test_write_of_no_bytes_fails_as_a_write(
    tmp_path: Path, make: OffloadMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = threading.Event()
    moving_at_most(monkeypatch, "pwritev", 0, when=now)
    offload = make(tmp_path)
    twin = Twin(offload)
    now.set()
    with pytest.warns(UserWarning, match="took no bytes"):
        twin.step(settled=True)
    assert offload.stats().failed_writes > 0


@deadline(60)
def test_read_of_no_bytes_is_an_error(tmp_path: Path, make: OffloadMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    now = threading.Event()
    moving_at_most(monkeypatch, "preadv", 0, when=now)
    offload = make(tmp_path)
    twin = Twin(offload)
    now.set()
    twin.step_fails(OffloadIOError, re.escape(str(tmp_path)) + ".*bytes are missing")
    now.clear()
    twin.step(settled=True)


# Reads that fail, or bring other bytes.


@IN_PLACE
@deadline(60)
def test_failed_read_is_tried_again(tmp_path: Path, make: OffloadMaker, in_place: bool) -> None:
    backend = FaultyBackend(read=failing(errno.EIO, at=[0]), in_place=in_place)
    offload = make(tmp_path, backend)
    twin = Twin(offload, "attention")
    backend.arm()
    for _ in range(2):
        twin.step(settled=True)
    assert backend.reads > 1


@IN_PLACE
@pytest.mark.parametrize("kind", list(MODELS))
@deadline(60)
def test_reads_that_fail_always_are_an_error_and_the_next_step_is_clean(
    tmp_path: Path, make: OffloadMaker, kind: str, in_place: bool
) -> None:
    backend = FaultyBackend(read=failing(errno.EIO), in_place=in_place)
    offload = make(tmp_path, backend)
    twin = Twin(offload, kind)
    twin.step(settled=True)
    backend.arm()
    twin.step_fails(OffloadIOError, re.escape(str(tmp_path)) + ".*cannot read .* Input/output error")
    backend.clear()
    twin.step(settled=True)
    assert lanes_alive(offload)
    assert_all_given_back(offload)


@IN_PLACE
@deadline(60)
def test_read_errors_that_come_and_go(tmp_path: Path, make: OffloadMaker, in_place: bool) -> None:
    backend = FaultyBackend(in_place=in_place)
    offload = make(tmp_path, backend)
    twin = Twin(offload, "attention")
    for numbers in ([3, 4], [5, 6, 7], list(range(1, 100, 2))):
        backend.arm(read=failing(errno.EIO, at=numbers))
        try:
            found = twin.run.step(settled=True)
        except OffloadIOError:
            twin.run.give_up()
        else:
            twin.compare(found)
        backend.clear()
        twin.step(settled=True)


@IN_PLACE
@deadline(60)
def test_lost_write_is_a_corruption(tmp_path: Path, make: OffloadMaker, in_place: bool) -> None:
    """The extent has the bytes of an earlier step, or none."""
    backend = FaultyBackend(in_place=in_place)
    offload = make(tmp_path, backend)
    twin = Twin(offload, "attention")
    for _ in range(2):
        twin.step(settled=True)
    for fault in (lost(), lost(at=[5]), lost(at=[0])):
        backend.arm(write=fault)
        twin.step_fails(OffloadCorruptionError, re.escape(str(tmp_path)) + ".*checksum differs")
        backend.clear()
        twin.step(settled=True)
    assert_all_given_back(offload)


@IN_PLACE
@pytest.mark.parametrize("kind", list(MODELS))
@deadline(60)
def test_flipped_bit_is_a_corruption(tmp_path: Path, make: OffloadMaker, kind: str, in_place: bool) -> None:
    offload = make(tmp_path, FaultyBackend(in_place=in_place))
    twin = Twin(offload, kind)
    twin.step(settled=True)

    def spoil(place: str) -> None:
        candidates = offload.debug_state().stored
        victim = candidates[len(candidates) // 2]
        flip_bit(victim, {"first": 0, "middle": victim.nbytes // 2, "last": victim.nbytes - 1}[place])

    for place in ("first", "middle", "last"):
        twin.step_fails(
            OffloadCorruptionError,
            re.escape(str(tmp_path)) + ".*no gradient was computed from it",
            before_backward=lambda place=place: spoil(place),
        )
    twin.step(settled=True)
    assert lanes_alive(offload)
    assert_all_given_back(offload)


@deadline(60)
def test_bytes_around_the_tensor_do_not_matter(tmp_path: Path, make: OffloadMaker) -> None:
    offload = make(tmp_path)
    twin = Twin(offload, "attention")

    def spoil() -> None:
        for stored in offload.debug_state().stored:
            for byte in (-1, stored.nbytes):
                if stored.blocks[0] <= stored.offset + byte < stored.blocks[1]:
                    flip_bit(stored, byte)

    twin.step(settled=True, before_backward=spoil)


@deadline(60)
def test_slab_cut_short_is_an_error(tmp_path: Path, make: OffloadMaker) -> None:
    offload = make(tmp_path)
    twin = Twin(offload, "attention")
    fd = offload.debug_state().slabs[0].fd
    twin.step_fails(
        OffloadIOError,
        re.escape(str(tmp_path)) + ".*bytes are missing",
        before_backward=lambda: os.truncate(f"/proc/self/fd/{fd}", 0),
    )
    os.truncate(f"/proc/self/fd/{fd}", 16 << 20)
    twin.step(settled=True)


@pytest.mark.skipif(not is_built(), reason="DeepSpeed's aio extension is not built")
@pytest.mark.slow
def test_first_writes_of_aio_do_not_lock_each_other_out(tmp_path: Path) -> None:
    code, said, errors = outcome(python("write_first_with_aio", str(tmp_path)))
    assert (code, said.split("\n")[-2:]) == (0, ["written", ""]), errors[-3000:]


def test_aio_is_not_compiled_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    with pytest.raises(OffloadError, match=r"aio is not compiled \(narrowgauge build --aio\)"):
        new_offload(tmp_path, backend="aio")
    new_offload(tmp_path, backend="auto").close()
    assert not list((tmp_path / "extensions").rglob("*.ninja"))


@pytest.mark.skipif(not is_built(), reason="DeepSpeed's aio extension is not built")
def test_build_of_another_environment_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("async_io", "pin_memory"):
        source, copied = build_folder(name), tmp_path / name
        copied.mkdir()
        (copied / "build.ninja").write_text((source / "build.ninja").read_text())
        (copied / f"{name}.so").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert is_built()
    command = tmp_path / "async_io" / "build.ninja"
    command.write_text(command.read_text())
    assert not is_built(), "a build that was not ended"
    (tmp_path / "async_io" / "async_io.so").touch()
    assert is_built()
    own = command.read_text()
    packages = str(Path(torch.__file__).parents[1])
    # The second ends with the path of this environment.
    for other in (packages.replace("site-packages", "other-packages"), f"/other{packages}"):
        command.write_text(own.replace(packages, other))
        (tmp_path / "async_io" / "async_io.so").touch()
        assert not is_built()


@pytest.mark.parametrize("flip", [False, True], ids=["truncated", "flipped"])
@pytest.mark.parametrize("backend", ["threads", "aio"])
@pytest.mark.slow
def test_no_process_dies_of_a_spoiled_slab(tmp_path: Path, backend: str, flip: bool) -> None:
    if backend == "aio" and not is_built():
        pytest.skip("DeepSpeed's aio extension is not built")
    code, said, errors = outcome(python("read_truncated", str(tmp_path), backend, flip))
    assert code == 0, errors[-3000:]
    expected = "OffloadCorruptionError" if flip else "OffloadIOError"
    assert re.search(rf"^{expected}: {re.escape(str(tmp_path))}", said, re.MULTILINE), said
    assert said.rstrip().endswith("closed")
    assert not os.listdir(tmp_path)


@deadline(60)
def test_backward_again_after_an_error(tmp_path: Path, make: OffloadMaker) -> None:
    """The same graph, when the disk is well again; nothing was accumulated wrongly in between."""
    backend = FaultyBackend()
    offload = make(tmp_path, backend)
    training = Training("chain", offload)
    loss = training.forward()
    settle(offload)
    backend.arm(read=failing(errno.EIO))
    with pytest.raises(OffloadIOError):
        loss.backward(retain_graph=True)
    training.give_up()
    backend.clear()
    loss.backward()
    for found, wanted in zip(training.finish(), Training("chain").step(), strict=True):
        assert torch.equal(found, wanted)


# Disks that are slow or do not answer.


def mixed_use(offload: ActivationOffload | None, model: nn.Module) -> list[Tensor]:
    """Graphs that are used twice, dropped, two at a time, used in part, and in another order than made."""
    found: list[Tensor] = []

    def forward(step: int) -> Tensor:
        if offload is None:
            return loss_of(model, step)
        with offload:
            return loss_of(model, step)

    def take() -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                found.append(parameter.grad.clone())
                parameter.grad = None

    loss = forward(0)
    loss.backward(retain_graph=True)
    take()
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    take()
    forward(1)
    dropped = forward(2)
    kept = forward(3)
    del dropped
    kept.backward()
    take()
    first, second, third = forward(4), forward(5), forward(6)
    second.backward()
    del third
    first.backward()
    take()
    parameters = list(model.parameters())
    found += torch.autograd.grad(forward(7), parameters[-1:])
    found += torch.autograd.grad(forward(8) * forward(9), parameters)
    return found


def same_mixed_use(offload: ActivationOffload, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = MODELS[kind]()
    wanted = mixed_use(None, model)
    found = mixed_use(offload, model)
    assert len(found) == len(wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "seed", [seed if seed < 4 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(10)]
)
@deadline(90)
def test_randomly_delayed_transfers(tmp_path: Path, make: OffloadMaker, seed: int) -> None:
    backend = FaultyBackend(write=delayed(seed, 0.01), read=delayed(seed + 100, 0.01), in_place=seed % 2 == 0)
    options = {"num_lanes": 1 + seed % 3, "buffer_bytes": (4096, 100_000, 1 << 20, 64 << 20)[seed % 4]}
    if seed % 5 == 0:
        options["host_memory_bytes"] = 200_000
    if seed % 5 == 1:
        options["capacity_bytes"] = 500_000
    offload = make(tmp_path, backend, **options)
    backend.arm()
    for kind in MODELS:
        same_mixed_use(offload, kind, seed)
    assert offload.stats().written > 0
    assert lanes_alive(offload, options["num_lanes"])
    assert_all_given_back(offload)


@IN_PLACE
@pytest.mark.parametrize("kind", ["attention", "recurrent"])
@deadline(60)
def test_slow_disk(tmp_path: Path, make: OffloadMaker, kind: str, in_place: bool) -> None:
    backend = FaultyBackend(write=limited(5e6), read=limited(10e6), in_place=in_place)
    offload = make(tmp_path, backend)
    twin = Twin(offload, kind)
    backend.arm()
    for _ in range(2):
        twin.step()
    twin.step(settled=True)
    assert offload.stats().io_stall > 0


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("kind", list(MODELS))
@IN_PLACE
@deadline(60)
@pytest.mark.slow
def test_pool_of_one_page_does_not_hang(
    tmp_path: Path, make: OffloadMaker, kind: str, lanes: int, in_place: bool
) -> None:
    offload = make(tmp_path, FaultyBackend(in_place=in_place), num_lanes=lanes, buffer_bytes=4096)
    same_mixed_use(offload, kind, 0)
    twin = Twin(offload, kind)
    for _ in range(3):
        twin.step()
    assert_all_given_back(offload)


@deadline(60)
def test_buffer_that_comes_back_just_now_is_not_missed() -> None:
    """Between a lane's look for a buffer and its putting the write back, when another lane finds no write to do."""
    tokens, returned, tries = SimpleQueue[Any](), [0], []
    lanes = Lanes(ThreadsBackend(), 2, tokens, lambda: returned[0])

    def work(_: Lane) -> bool:
        tries.append(threading.get_ident())
        if len(tries) > 1:
            return True
        returned[0] += 1
        tokens.put(True)
        time.sleep(0.2)
        return False

    transfer = Transfer(work)
    lanes.write(transfer)
    assert transfer.wait(2)
    assert len(tries) == 2
    assert lanes.close(5)


@pytest.mark.parametrize("lanes", [1, 2])
@IN_PLACE
@deadline(60)
def test_hanging_read_is_an_error_in_time(tmp_path: Path, make: OffloadMaker, lanes: int, in_place: bool) -> None:
    answer = threading.Event()
    backend = FaultyBackend(read=hanging(answer), in_place=in_place)
    offload = make(tmp_path, backend, num_lanes=lanes, io_timeout=0.5)
    twin = Twin(offload, "attention")
    twin.step(settled=True)
    backend.arm()
    began = time.monotonic()
    twin.step_fails(OffloadIOError, re.escape(str(tmp_path)) + ".*no answer to a read of .* within 0.5 s")
    assert 0.4 < time.monotonic() - began < 5
    try:
        began = time.monotonic()
        within(10, offload.close)
        assert time.monotonic() - began < 5
    finally:
        answer.set()


@deadline(60)
def test_answer_after_the_time_limit(tmp_path: Path, make: OffloadMaker) -> None:
    """The next step on the same object is clean, as is a second try on the same graph."""
    answer = threading.Event()
    backend = FaultyBackend(read=hanging(answer))
    offload = make(tmp_path, backend, io_timeout=0.3)
    twin = Twin(offload, "attention")
    loss = twin.run.forward()
    settle(offload)
    backend.arm()
    with pytest.raises(OffloadIOError, match="no answer"):
        loss.backward(retain_graph=True)
    twin.run.give_up()
    answer.set()
    loss.backward()
    twin.compare(twin.run.finish())
    del loss
    twin.step(settled=True)
    assert_all_given_back(offload)


@IN_PLACE
@deadline(60)
def test_hanging_write_does_not_stop_training(tmp_path: Path, make: OffloadMaker, in_place: bool) -> None:
    answer = threading.Event()
    backend = FaultyBackend(write=hanging(answer), in_place=in_place)
    offload = make(tmp_path, backend, io_timeout=0.5)
    twin = Twin(offload, "attention")
    backend.arm()
    for _ in range(3):
        twin.step()
    answer.set()
    settle(offload)
    twin.step(settled=True)
    assert_all_given_back(offload)


@pytest.mark.parametrize("operation", ["write", "read"])
@deadline(60)
def test_transfer_that_outlives_close_touches_no_other_file(tmp_path: Path, make: OffloadMaker, operation: str) -> None:
    """A large transfer takes several calls; the descriptor's number may belong to somebody else by then."""
    answer = threading.Event()
    backend = FaultyBackend()
    offload = make(tmp_path, backend, num_lanes=1, io_timeout=0.3)
    training = Training("chain", offload)
    backend.arm(**{operation: hanging(answer)})
    loss = training.forward()
    if operation == "read":
        settle(offload)
        with pytest.raises(OffloadIOError):
            loss.backward()
    fd = offload.debug_state().slabs[0].fd
    within(10, offload.close)
    precious = tmp_path / "checkpoint"
    precious.write_bytes(b"x" * (4 << 20))
    opened = [os.open(precious, os.O_RDWR) for _ in range(3)]
    try:
        answer.set()
        wait_until(lambda: lanes_alive(offload, 0), "the lane did not end")
        assert precious.read_bytes() == b"x" * (4 << 20), f"descriptor {fd} was used after it was closed"
    finally:
        for descriptor in opened:
            os.close(descriptor)


# Odd exceptions.


@IN_PLACE
@pytest.mark.parametrize("error", [ValueError, MemoryError, SystemExit, KeyboardInterrupt])
@deadline(60)
def test_odd_exception_does_not_end_the_lanes(
    tmp_path: Path, make: OffloadMaker, error: type[BaseException], in_place: bool
) -> None:
    backend = FaultyBackend(in_place=in_place)
    offload = make(tmp_path, backend)
    twin = Twin(offload, "attention")
    backend.arm(write=failing(error, at=[0, 1, 2, 3]), read=lambda number, proceed, nbytes: proceed())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin.step(settled=True)
    backend.arm(write=lambda number, proceed, nbytes: proceed(), read=failing(error))
    twin.step_fails(OffloadIOError, re.escape(str(tmp_path)))
    backend.clear()
    assert lanes_alive(offload)
    before = offload.stats().written
    twin.step(settled=True)
    assert offload.stats().written > before
    assert_all_given_back(offload)


def refuse(nbytes: int) -> Tensor:
    raise MemoryError("odd")


@pytest.mark.parametrize("host_memory", [0, 1 << 30])
@deadline(60)
def test_no_memory_for_a_buffer(
    tmp_path: Path, make: OffloadMaker, monkeypatch: pytest.MonkeyPatch, host_memory: int
) -> None:
    """Of a write, which is not needed then; training goes on. What the tier in RAM lacked was once told to nobody."""
    backend = FaultyBackend(in_place=False)
    offload = make(tmp_path, backend, host_memory_bytes=host_memory)
    twin = Twin(offload, "attention")
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(backend, "new_buffer", refuse)
        for _ in range(2):
            twin.step(settled=True)
    assert len([one for one in caught if "stays in memory" in str(one.message)]) == 1
    assert offload.stats().failed_writes > 8
    assert lanes_alive(offload)
    twin.step(settled=True)
    assert (offload.stats().written > 0) == (host_memory == 0)
    assert_all_given_back(offload)


@deadline(60)
def test_no_memory_to_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then backward reads what it asks for, when it does."""
    backend = FaultyBackend()
    transport = Transport(
        backend, SlabStore([tmp_path], 4 << 20), num_lanes=1, buffer_bytes=4096, host_memory_bytes=0, io_timeout=30.0
    )
    graph = ForwardGraph(transport, min_bytes=1, budget=math.inf, only_marked=False)
    plain, used = (torch.linspace(-2, 2, 10_000).requires_grad_() for _ in range(2))
    plain.mul(2).exp().sin().cos().sum().backward()
    with saved_tensors_hooks(graph.pack, graph.unpack):
        loss = used.mul(2).exp().sin().cos().sum()
    wait_until(lambda: all(record.in_memory() is None for record in graph.living_records()), "memory is kept")
    with monkeypatch.context() as patch:
        patch.setattr(backend, "new_buffer", refuse)
        assert [transport.prefetch(record) for record in graph.living_records()] == [False, False]
    loss.backward()
    assert plain.grad is not None
    assert used.grad is not None
    assert torch.equal(plain.grad, used.grad)
    assert transport.counters.read.bytes >= 2 * 40_000
    transport.close()


@pytest.mark.parametrize("where", ["write", "read", "buffer"])
@deadline(60)
def test_an_error_keeps_no_memory(
    tmp_path: Path, make: OffloadMaker, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Without waiting for Python's collection of cycles, which may be a long time off."""
    backend = FaultyBackend(in_place=where != "buffer")
    offload = make(tmp_path, backend)
    training = Training("attention", offload)
    gc.collect()
    gc.disable()
    try:
        training.step(settled=True)
        rest(offload)
        assert offload.stats().saved == 0
        if where == "buffer":
            monkeypatch.setattr(backend, "new_buffer", refuse)
            training.offload = offload = make(tmp_path, backend)
            training.step(settled=True)
        elif where == "write":
            backend.arm(write=failing(errno.EIO))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                training.step(settled=True)
        else:
            backend.arm(read=failing(errno.EIO))
            try:
                training.step(settled=True)
            except OffloadIOError:
                pass
            else:
                raise AssertionError("no error")
        until = time.monotonic() + 3
        while (left := (offload.stats().saved, offload.debug_state().slab_bytes)) != (0, 0):
            assert time.monotonic() < until, f"still saved, in the slab: {left}"
            time.sleep(0.01)
    finally:
        gc.enable()


# Folders and filesystems.


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_path_that_is_no_folder(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "file":
        path.write_text("")
    descriptors = open_descriptors()
    with pytest.raises(OffloadError, match=re.escape(str(path))):
        new_offload(path)
    with pytest.raises(OffloadError, match=re.escape(str(path))):
        ActivationOffload([tmp_path, path])
    assert open_descriptors() == descriptors


@pytest.mark.parametrize("kind", ["read-only", "hidden"])
@pytest.mark.slow
def test_path_that_may_not_be_used(kind: str) -> None:
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as name:
        outer = Path(name)
        inner = outer / "scratch"
        inner.mkdir()
        inner.chmod(0o555 if kind == "read-only" else 0o777)
        outer.chmod(0o755 if kind == "read-only" else 0o700)
        code, said, errors = outcome(python("construct", str(inner), 65534))
    assert code == 0, errors[-3000:]
    assert said.startswith(f"OffloadError: {inner}"), said


@pytest.mark.parametrize("capacity", [4 << 20, None], ids=["fixed", "automatic"])
@deadline(60)
def test_folder_removed_while_running(tmp_path: Path, make: OffloadMaker, capacity: int | None) -> None:
    """The slab is open and has no name."""
    with Mounted(tmp_path, "tmpfs", 256) as root:
        folder = root / "scratch"
        folder.mkdir()
        offload = make(folder, capacity_bytes=capacity)
        twin = Twin(offload, "attention")
        twin.step(settled=True)
        shutil.rmtree(folder)
        for _ in range(5):
            before = offload.stats().read
            twin.step(settled=True)
            assert offload.stats().read > before
        offload.close()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "ext2"])
@pytest.mark.parametrize("capacity", [400 << 20, None], ids=["fixed", "automatic"])
@deadline(60)
def test_disk_that_is_too_small(tmp_path: Path, kind: str, capacity: int | None) -> None:
    with Mounted(tmp_path, kind, 24) as folder:
        free, descriptors, threads = free_bytes(folder), open_descriptors(), threading.active_count()
        needed = capacity or 128 << 20
        with pytest.raises(OffloadSpaceError) as caught:
            new_offload(folder, capacity_bytes=capacity)
        message = str(caught.value)
        assert message.startswith(f"{folder}: ")
        assert f"bytes free, got {free:,}" in message
        assert f"{needed:,}" in message
        assert (free_bytes(folder), open_descriptors(), threading.active_count()) == (free, descriptors, threads)
        assert os.listdir(folder) == []


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "ext2"])
@deadline(60)
def test_last_byte_of_a_disk(tmp_path: Path, make: OffloadMaker, kind: str) -> None:
    """Filesystems count differently what is free; it is the slab or an error with both numbers, nothing half-way."""
    with Mounted(tmp_path, kind, 24) as folder:
        free = free_bytes(folder)
        descriptors = open_descriptors()
        try:
            offload = make(folder, capacity_bytes=free // 4096 * 4096)
        except OffloadSpaceError as error:
            message = str(error)
            assert str(folder) in message
            assert f"{free // 4096 * 4096:,}" in message
            assert f"{free:,}" in message, message
        else:
            Twin(offload).step(settled=True)
            offload.close()
        assert (free_bytes(folder), open_descriptors()) == (free, descriptors)


@deadline(60)
def test_slab_that_fits_needs_no_more_room(tmp_path: Path) -> None:
    """The disk's speed is measured at the start; that takes no room beside the slab's."""
    with Mounted(tmp_path, "tmpfs", 24) as folder:
        offload = new_offload(folder, capacity_bytes=20 << 20)
        Twin(offload).step(settled=True)
        offload.close()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "ext2"])
@deadline(60)
def test_disk_filled_by_others_while_running(tmp_path: Path, make: OffloadMaker, kind: str) -> None:
    """The slab's blocks were reserved before."""
    with Mounted(tmp_path, kind, 24) as folder:
        offload = make(folder, capacity_bytes=8 << 20)
        full = False
        with (folder / "others").open("wb", buffering=0) as file:
            while not full:
                try:
                    full = file.write(bytes(1 << 16)) == 0
                except OSError:
                    full = True
        twin = Twin(offload, "attention")
        for _ in range(3):
            twin.step(settled=True)
        assert offload.stats().failed_writes == 0
        assert offload.stats().read > 0
        offload.close()


@deadline(60)
def test_disk_filled_before_an_automatic_slab_grows(tmp_path: Path, make: OffloadMaker) -> None:
    """A reservation that cannot grow stays as it is."""
    with Mounted(tmp_path, "tmpfs", 160) as folder:
        offload = make(folder, capacity_bytes=None)
        with (folder / "others").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free_bytes(folder) - 8192)
        # More than the slab has, which therefore is to grow.
        capacity = offload.stats().capacity
        x = torch.zeros(capacity // 4 + 1, requires_grad=True)

        def save_too_much() -> None:
            with offload:
                loss = x.exp().sum()
            wait_until(lambda: offload.stats().full > 0, "it was written")
            del loss

        with pytest.warns(UserWarning, match="has no room"):
            save_too_much()
        twin = Twin(offload, "attention")
        for _ in range(5):
            twin.step(settled=True)
        assert offload.stats().read > 0
        assert offload.stats().full > 0
        assert offload.stats().capacity == capacity
        offload.close()


@deadline(60)
def test_reservation_stays_when_one_of_two_disks_cannot_grow(tmp_path: Path) -> None:
    with Mounted(tmp_path, "tmpfs", 32) as first, Mounted(tmp_path, "tmpfs", 16) as second:
        store = SlabStore([first, second], 16 << 20)
        with pytest.raises(OffloadSpaceError, match=re.escape(str(second))):
            store.resize_unused(48 << 20)
        assert [file.capacity for file in store.files] == [8 << 20, 8 << 20]
        store.close()


@pytest.mark.parametrize("error", ["EIO", "unknown backend", "no layers", "odd"])
@deadline(60)
def test_failed_start_leaves_nothing_behind(tmp_path: Path, error: str) -> None:
    descriptors, threads = open_descriptors(), threading.active_count()
    with pytest.raises((OffloadError, ValueError)):
        start_with(tmp_path, error)
    gc.collect()
    assert (open_descriptors(), threading.active_count()) == (descriptors, threads)
    assert os.listdir(tmp_path) == []


def start_with(folder: Path, error: str) -> ActivationOffload:
    if error == "no layers":
        return new_offload(folder, granularity="layer_inputs", model=nn.Linear(2, 2))
    if error == "unknown backend":
        return new_offload(folder, backend="no such backend")
    backend = FaultyBackend(write=failing(errno.EIO if error == "EIO" else ValueError))
    backend.arm()
    return new_offload(folder, backend=backend)


# Processes.


def test_killed_run_leaves_nothing_and_starts_again(tmp_path: Path) -> None:
    with Mounted(tmp_path, "tmpfs", 64) as folder:
        free = free_bytes(folder)
        process = python("train_for_ever", str(folder), 24 << 20)
        try:
            lines = spawn_lines(process)
            for _ in range(5):
                assert next(lines, "ended") == "step", process.communicate()[1][-3000:]
            assert free_bytes(folder) <= free - (24 << 20)
            assert os.listdir(folder) == []
        finally:
            process.kill()
            process.communicate()
        assert os.listdir(folder) == []
        assert free_bytes(folder) == free
        train_compared(str(folder), 2)
        assert free_bytes(folder) == free


def test_two_runs_on_one_path(tmp_path: Path) -> None:
    process = python("train_compared", str(tmp_path), 30, "attention")
    try:
        while process.poll() is None:
            train_compared(str(tmp_path), 10, "diamond")
    finally:
        code, said, errors = outcome(process)
    assert (code, said) == (0, "same bits\n"), errors[-3000:]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("hang", [False, True], ids=["slow", "hanging"])
@pytest.mark.slow
def test_process_ends_without_close(tmp_path: Path, hang: bool) -> None:
    """Transfers that are under way do not hold it up, nor crash it."""
    began = time.monotonic()
    code, said, errors = outcome(python("leave_without_closing", str(tmp_path), hang))
    assert (code, said) == (0, "left True\n"), errors[-3000:]
    assert time.monotonic() - began < 40
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_process_ends_without_close_while_copying(tmp_path: Path) -> None:
    for _ in range(3):
        code, said, errors = outcome(python("leave_while_copying", str(tmp_path)))
        assert (code, said) == (0, "left\n"), errors[-3000:]


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("wrapped", [True, False], ids=["ddp", "all_reduce"])
@pytest.mark.slow
def test_error_on_one_rank_ends_both(tmp_path: Path, wrapped: bool, failing_rank: int) -> None:
    port = int(free_port())
    ranks = [python("train_on_rank", str(tmp_path), rank, port, failing_rank, wrapped) for rank in range(2)]
    try:
        results = [outcome(process) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(code != 0 for code, _, _ in results), results
    assert "OffloadCorruptionError" in results[failing_rank][2]
    assert all("step 2" in said and "step 5" not in said for _, said, _ in results)
    assert os.listdir(tmp_path) == []


# The package itself.


@pytest.mark.slow
def test_nothing_depends_on_assert(tmp_path: Path) -> None:
    code, said, errors = outcome(python("train_compared", str(tmp_path), 3, PYTHONOPTIMIZE="1"))
    assert (code, said) == (0, "same bits\n"), errors[-3000:]


@pytest.mark.parametrize(
    "options",
    [
        {"num_lanes": 0},
        {"num_lanes": 65},
        {"buffer_bytes": 0},
        {"capacity_bytes": 0},
        {"io_timeout": 0.0},
        {"io_timeout": math.nan},
        {"io_timeout": math.inf},
        {"keep_resident": 1.5},
        {"min_tensor_bytes": -1},
    ],
    ids=str,
)
def test_arguments_out_of_range(tmp_path: Path, options: dict[str, Any]) -> None:
    descriptors = open_descriptors()
    with pytest.raises(ValueError, match=next(iter(options))):
        new_offload(tmp_path, **options)
    assert open_descriptors() == descriptors


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("num_lanes", "two", "an int"),
        ("num_lanes", True, "an int"),
        ("capacity_bytes", 1e9, "an int"),
        ("min_tensor_bytes", None, "an int"),
        ("io_timeout", "5", "a number"),
        ("model", "gpt2", "a torch.nn.Module"),
    ],
)
def test_arguments_of_another_type(tmp_path: Path, name: str, value: Any, needed: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected {needed}, got "):
        new_offload(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("path", "error"), [("", ValueError), ([], ValueError), (3, TypeError), (["here", None], TypeError)]
)
def test_path_of_another_kind(path: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^path: expected .*, got "):
        new_offload(path)


def test_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "scratch").mkdir()
    offload = new_offload(Path("~/scratch"))
    assert [slab.folder for slab in offload.debug_state().slabs] == [tmp_path / "scratch"]
    offload.close()


def test_layers_that_cannot_recompute(tmp_path: Path) -> None:
    model = MODELS["chain"]()
    with pytest.raises(ValueError, match="layers: expected at least one, got none"):
        new_offload(tmp_path, model=model, granularity="layer_inputs", layers=[])
    with pytest.raises(ValueError, match=r"layers\[1\]: expected a module of model, got another Linear"):
        new_offload(tmp_path, model=model, granularity="layer_inputs", layers=[next(model.children()), nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="layers: expected a list of modules, got a generator"):
        new_offload(tmp_path, model=model, granularity="layer_inputs", layers=(layer for layer in model.children()))
    with pytest.raises(ValueError, match="layers: only granularity 'layer_inputs'"):
        new_offload(tmp_path, model=model, layers=[next(model.children())])


@pytest.mark.parametrize("nbytes", [1, 8, 100, 4096, 4099])
def test_checksum_on_the_device(nbytes: int) -> None:
    memory = torch.randint(256, (nbytes,), dtype=torch.uint8)
    expected = checksum_on_device(memory)
    assert checksum_on_device(memory, part=64) == expected
    for place in {0, nbytes // 2, nbytes - 1}:
        for bit in (0, 7):
            flipped = memory.clone()
            flipped[place] ^= 1 << bit
            assert checksum_on_device(flipped, part=64) != expected
