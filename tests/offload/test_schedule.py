"""Offload under a schedule: a pipeline stage's forwards and backwards in one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowgauge.offload import ActivationOffload, MicroBatch, OffloadError, Schedule
from narrowgauge.offload.planner import Forward, Saved, absorbable_shares
from narrowgauge.offload.schedule import Pass
from tests.offload.support import assert_nothing_left, new_offload, rest, settle

LAYERS, WIDTH, ROWS = 8, 32, 64
NBYTES = ROWS * WIDTH * 4


def one_f_one_b(count: int, ahead: int) -> list[Pass]:
    batches = [MicroBatch(number) for number in range(count)]
    passes: list[Pass] = [("forward", of) for of in batches[:ahead]]
    for of, other in zip(batches[ahead:], batches, strict=False):
        passes.append(("forward", of))
        passes.append(("backward", other))
    passes.extend(("backward", of) for of in batches[count - ahead :])
    return passes


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))


def inputs_of(step: int, of: MicroBatch) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 * step + of.number))


def run_step(model: nn.Module, schedule: Schedule, step: int, offload: ActivationOffload | None) -> Iterator[Pass]:
    """The passes of a step; yields each after it is done."""
    outputs: dict[MicroBatch, Tensor] = {}
    if offload is not None:
        offload.begin_step(schedule)
    for name, of in schedule.passes:
        if name == "backward":
            outputs.pop(of).square().mean().backward()
        elif offload is None:
            outputs[of] = model(inputs_of(step, of))
        else:
            with offload.forward(of):
                outputs[of] = model(inputs_of(step, of))
        yield name, of


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("keep_resident", "settles"), [(0.0, True), (0.5, False), ("auto", False)])
def test_gradients_are_the_same_bits(tmp_path: Path, keep_resident: float | str, settles: bool) -> None:
    schedule = Schedule(one_f_one_b(4, 2))
    plain, used = model_of(), model_of()
    offload = new_offload(tmp_path, model=used, keep_resident=keep_resident)
    for step in range(3):
        list(run_step(plain, schedule, step, None))
        for _ in run_step(used, schedule, step, offload):
            if settles:
                settle(offload)
    assert all(map(torch.equal, gradients(used), gradients(plain)))
    assert_nothing_left(offload)
    if settles and keep_resident == 0.0:
        # Tanh's outputs, which are the next layers' inputs.
        assert offload.stats().written > 3 * 4 * (LAYERS - 1) * NBYTES
    offload.close()


def test_what_the_next_backward_asks_for_is_read_before(tmp_path: Path) -> None:
    """In the order of the schedule: while the backward before it goes on, and as far as the buffers reach."""
    schedule, model = Schedule(one_f_one_b(4, 2)), model_of()
    window = 3 * (NBYTES + 8192)
    offload = new_offload(tmp_path, model=model, buffer_bytes=window)

    def rest_before_its_backward(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        # A lane lets go of its buffer a moment after its read; without one nothing is read before it is asked for.
        output.register_hook(lambda _gradient: rest(offload))

    for layer in model:
        layer.register_forward_hook(rest_before_its_backward)
    read = {}
    for done in run_step(model, schedule, 0, offload):
        settle(offload)
        rest(offload)
        # What is still in memory, as its write is late, is not read.
        read[done] = offload.stats().read + offload.stats().forwarded
    first, second, last = MicroBatch(0), MicroBatch(1), MicroBatch(3)
    # Before the first backward, during the forward that it follows.
    early = read["forward", MicroBatch(2)] - read["forward", second]
    assert 2 * NBYTES <= early <= window
    # What the first one read is its own rest, and the second's beginning.
    whole = read["backward", last] / 4
    assert whole < read["backward", first] <= whole + window
    # But for what the test itself holds: the last layer's output.
    written = offload.stats().written
    assert written - 4 * (NBYTES + 8192) <= read["backward", last] <= written
    offload.close()


def test_what_is_kept_is_not_written_under_a_plan_nor_before_it(tmp_path: Path) -> None:
    kept = [MicroBatch(number) for number in (1, 3)]
    schedule, model = Schedule(one_f_one_b(4, 1), kept=kept), model_of()
    offload = new_offload(tmp_path, model=model, keep_resident="auto")
    written = 0
    for step in range(2):
        for name, of in run_step(model, schedule, step, offload):
            settle(offload)
            if name == "forward":
                grown, written = offload.stats().written - written, offload.stats().written
                assert grown == 0 if of in kept else (grown > 0 or step > 0)
    offload.close()


def test_a_share_is_of_the_own_chunk(tmp_path: Path) -> None:
    """One chunk saves three times what the other does; half of each is written from the second step on."""
    chunks = [nn.Sequential(*(nn.Tanh() for _ in range(number))) for number in (4, 12)]
    passes: list[Pass] = [("forward", MicroBatch(0, chunk)) for chunk in (0, 1)]
    schedule = Schedule([*passes, *(("backward", MicroBatch(0, chunk)) for chunk in (1, 0))])
    offload = new_offload(tmp_path, keep_resident=0.5)
    for step in range(3):
        offload.begin_step(schedule)
        outputs, before = [], offload.stats().written
        for chunk, layers in enumerate(chunks):
            with offload.forward(MicroBatch(0, chunk)):
                outputs.append(layers(torch.ones(ROWS, WIDTH, requires_grad=True)))
            settle(offload)
            written, before = offload.stats().written - before, offload.stats().written
            expected = len(layers) * NBYTES // (2 if step else 1)
            assert expected <= written <= expected * 1.6
        for output in reversed(outputs):
            output.sum().backward()
    offload.close()


def test_a_forward_out_of_turn_is_refused(tmp_path: Path) -> None:
    offload = new_offload(tmp_path)
    with pytest.raises(OffloadError, match="expected begin_step"), offload.forward(MicroBatch(0)):
        pass
    offload.begin_step(Schedule(one_f_one_b(1, 0)))
    with (
        pytest.raises(
            OffloadError, match="expected micro-batch 0 of chunk 0, got a forward of micro-batch 1 of chunk 0"
        ),
        offload.forward(MicroBatch(1)),
    ):
        pass
    with offload.forward(MicroBatch(0)):
        pass
    with pytest.raises(OffloadError, match="expected the end of the step"), offload.forward(MicroBatch(0)):
        pass
    offload.close()


def test_passes_that_are_no_schedule_are_refused() -> None:
    forward: Pass = ("forward", MicroBatch(0))
    backward: Pass = ("backward", MicroBatch(0))
    for passes in ([forward], [forward, forward, backward], [forward, ("backward", MicroBatch(1))]):
        with pytest.raises(ValueError, match="expected one forward and one backward of each micro-batch"):
            Schedule(passes)
    with pytest.raises(ValueError, match="expected its forward before its backward"):
        Schedule([backward, forward])


def test_planned_shares_of_a_pipeline() -> None:
    """Two forwards of 2 x 100 bytes, then their backwards. At 100 B/s each way, effective, a tensor takes a second.

    Both groups are written by 4.0 if all goes to disk. The first backward asks at 6.0 and 7.0 for what it saved last
    and first, and may be read from 4.5 on: back at 5.5 and 6.5. The second asks at 8.0 and 8.6, read from 6.0 on: back
    at 7.5 and 8.5. One more tensor in the way would be too late.
    """
    speeds = {"write_bandwidth": 125.0, "read_bandwidth": 125.0, "window": 1000}
    one = Forward([Saved(100, 0.0, 7.0), Saved(100, 1.0, 6.0)], 4.5, "long")
    other = Forward([Saved(100, 2.0, 8.6), Saved(100, 3.0, 8.0)], 6.0, "short")
    assert absorbable_shares([one, other], groups=["long", "short"], **speeds) == {"long": 1.0, "short": 1.0}
    late = Forward([Saved(100, 2.0, 8.6), Saved(100, 3.0, 7.4)], 6.0, "short")
    assert absorbable_shares([one, late], groups=["long", "short"], **speeds) == {"long": 1.0, "short": 0.5}
    assert absorbable_shares([one, late], groups=["short", "long"], **speeds) == {"short": 1.0, "long": 0.5}
    # With room for one tensor the second backward's wait until the first's are used: back at 8.0 and 9.0.
    narrow = {**speeds, "window": 100}
    assert absorbable_shares([one, other], groups=["long", "short"], **narrow)["short"] == 0.5
