"""What happens around an ActivationOffload's life: not closed, copied, interrupted."""

import copy
import gc
import pickle
import random
import signal
import sys
import threading
import time
import warnings
from _thread import interrupt_main
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.offload.faults import open_descriptors
from tests.offload.support import GatedBackend, assert_nothing_left, new_offload, settle, wait_until


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background and had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def lane_count() -> int:
    return sum(thread.name.startswith("narrowgauge-offload") for thread in threading.enumerate())


def test_dropped_without_close_gives_everything_back(tmp_path: Path) -> None:
    before, lanes = open_descriptors(), lane_count()
    offload = new_offload(tmp_path, num_lanes=3)
    x = torch.randn(10_000, requires_grad=True)
    with offload:
        y = x.exp().sin().sum()
    settle(offload)
    assert lane_count() == lanes + 3
    del offload
    # The graph still needs it, until here.
    with pytest.warns(ResourceWarning, match=f"{tmp_path}: an ActivationOffload was not closed"):
        y.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().exp().cos() * x.detach().exp())
    wait_until(lambda: lane_count() == lanes, "threads are left")
    wait_until(lambda: open_descriptors() == before, "descriptors are left")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_dropped_where_warnings_are_errors(tmp_path: Path) -> None:
    before, lanes = open_descriptors(), lane_count()
    offload = new_offload(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del offload
        gc.collect()
    wait_until(lambda: (lane_count(), open_descriptors()) == (lanes, before), "threads or descriptors are left")


@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_closing_gives_the_space_back(tmp_path: Path) -> None:
    backend, before = GatedBackend(), open_descriptors()
    offload = new_offload(tmp_path, backend=backend)
    backend.gate.clear()
    x = torch.randn(10_000, requires_grad=True)
    with offload:
        y = x.exp().sin().sum()
    assert backend.begun.wait(20)
    # A signal proper: it wakes a thread that waits.
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        offload.close()
    assert offload.stats().capacity == 64 << 20
    # The number of the descriptor stays taken: a write is still to come. It does not lead to the slab any more.
    (slab,) = offload.debug_state().slabs
    assert slab.fd == -1
    backend.gate.set()
    del y, offload
    gc.collect()
    wait_until(lambda: lane_count() == 0, "threads are left")
    assert open_descriptors() <= before + 1


def test_closed_in_time_is_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        offload = new_offload(tmp_path)
        offload.close()
        del offload
        gc.collect()


def test_two_objects_do_not_recompute_the_same_layers(tmp_path: Path) -> None:
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    options: dict[str, Any] = {"model": nn.Sequential(model), "granularity": "layer_inputs"}
    one = new_offload(tmp_path, **options)
    with pytest.raises(ValueError, match="a Linear is recomputed by another ActivationOffload"):
        new_offload(tmp_path, **options)
    one.close()
    other = new_offload(tmp_path, **options)
    other.close()
    assert all("forward" not in vars(layer) for layer in model)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_short_inputs_do_not_change_what_stays_of_long_ones(tmp_path: Path, share: float) -> None:
    offload = new_offload(tmp_path, keep_resident=share, capacity_bytes=256 << 20, buffer_bytes=4096)
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(16)]

    def step(rows: int) -> float:
        x = torch.ones(rows, 64)
        offload.reset_peaks()
        with offload:
            for weight in weights:
                x = (x @ weight).tanh()
        settle(offload)
        stats = offload.stats()
        x.sum().backward()
        return stats.resident / stats.saved

    for rows in (4096, 4096, 16, 16, 16, 16, 16):
        step(rows)
    # The last of them is somebody's tensor anyway.
    assert step(4096) == pytest.approx(share, abs=1.5 / 16)
    offload.close()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_cannot_be_copied(tmp_path: Path, how: Any) -> None:
    offload = new_offload(tmp_path)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        how(offload)
    offload.close()


@pytest.mark.alone
@pytest.mark.parametrize("times", [8, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("interruptible")
def test_interrupts_in_backward_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """An exception of a signal handler that arises in a finalizer is printed and forgotten."""
    lost: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    offload = new_offload(tmp_path, capacity_bytes=256 << 20)
    weights = [torch.randn(512, 512, requires_grad=True) for _ in range(12)]
    dice = random.Random(0)

    def forward() -> Tensor:
        x = torch.ones(512, 512)
        with offload:
            for weight in weights:
                x = (x @ weight).tanh()
            return x.sum()

    forward().backward()
    began = time.perf_counter()
    forward().backward()
    usual = time.perf_counter() - began
    for _ in range(times):
        loss = forward()
        settle(offload)
        timer = threading.Timer(usual * dice.random(), interrupt_main)
        caught = False
        try:
            timer.start()
            loss.backward()
            timer.join()
            # The handler runs in the main thread's next line at the latest.
            time.sleep(0.01)
        except KeyboardInterrupt:
            caught = True
        with suppress(KeyboardInterrupt):
            timer.join()
        del loss
        assert caught
        assert not lost
    assert_nothing_left(offload)
    offload.close()
