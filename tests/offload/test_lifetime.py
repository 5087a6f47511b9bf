"""What happens around an ActivationOffload's life: not closed, copied, interrupted."""

import copy
import gc
import pickle
import random
import sys
import threading
import time
import warnings
from _thread import interrupt_main
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.offload.faults import open_descriptors
from tests.offload.support import assert_nothing_left, new_offload, settle, wait_until


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


def test_closed_in_time_is_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        offload = new_offload(tmp_path)
        offload.close()
        del offload
        gc.collect()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_cannot_be_copied(tmp_path: Path, how: Any) -> None:
    offload = new_offload(tmp_path)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        how(offload)
    offload.close()


def test_interrupts_in_backward_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for _ in range(30):
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
