"""Compiled models: what their backward needs goes through the same hooks, with the same bits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

from narrowgauge.offload import ActivationOffload
from tests.offload.support import assert_nothing_left, assert_same, grads_of, new_offload, settle
from tests.support.models import tiny, token_batch


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def offload(tmp_path: Path) -> Iterator[ActivationOffload]:
    offload = new_offload(tmp_path)
    yield offload
    assert_nothing_left(offload)
    offload.close()


def train(backend: str, use: ActivationOffload | None, steps: int) -> tuple[list[Tensor], int]:
    """Losses and final parameters, and the number of graphs that were compiled."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        if use is None:
            loss = compiled(token_batch(step, 4))
            loss.backward()
        else:
            before = use.stats()
            with use:
                loss = compiled(token_batch(step, 4))
            settle(use)
            middle = use.stats()
            assert middle.saved > 0
            assert middle.resident == 0
            assert middle.written - before.written >= middle.saved
            loss.backward()
            assert use.stats().read > middle.read
            assert use.stats().saved == 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach() for parameter in model.parameters())], counters["stats"]["unique_graphs"]


@pytest.mark.quick("eager")
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        "aot_eager_decomp_partition",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor")),
    ],
)
def test_context_around_a_compiled_model(offload: ActivationOffload, backend: str) -> None:
    found, compilations = train(backend, offload, steps=4)
    wanted, expected = train(backend, None, steps=4)
    assert_same(found, wanted)
    # Neither entering it for every step nor the hooks make it compile again.
    assert compilations == expected


@pytest.mark.slow
def test_context_may_come_and_go(offload: ActivationOffload) -> None:
    """What was compiled with the hooks set runs without them, and the other way round."""

    def run(with_it: list[bool]) -> tuple[list[Tensor | None], list[int]]:
        torch._dynamo.reset()
        model = tiny()
        compiled = torch.compile(model, backend="aot_eager")
        saved = []
        for step, switched_on in enumerate(with_it):
            if switched_on:
                with offload:
                    loss = compiled(token_batch(step, 4))
            else:
                loss = compiled(token_batch(step, 4))
            saved.append(offload.stats().saved)
            loss.backward()
            assert_nothing_left(offload)
        return grads_of(list(model.parameters())), saved

    wanted, _ = run([False] * 4)
    for with_it in ([True, False, True, False], [False, True, False, True]):
        found, saved = run(with_it)
        assert_same(found, wanted)
        assert [amount > 0 for amount in saved] == with_it


def test_parameters_of_a_compiled_model_are_not_written(offload: ActivationOffload) -> None:
    layer = torch.compile(nn.Linear(400, 300, bias=False), backend="aot_eager")
    x = torch.randn(2, 400, requires_grad=True)
    before = offload.stats().written
    with offload:
        y = layer(x)
    settle(offload)
    assert offload.stats().saved == 2 * 400 * 4
    assert offload.stats().written - before <= 2 * 4096
    y.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_context_inside_of_a_compiled_function(offload: ActivationOffload, backend: str) -> None:
    """It breaks the graph, as any context manager of one's own does; the result is right."""

    def part(x: Tensor, use: ActivationOffload | None) -> Tensor:
        h = (x * 2).sin()
        if use is None:
            return h.exp().cos().pow(3).sum()
        with use:
            return h.exp().cos().pow(3).sum()

    compiled = torch.compile(part, backend=backend)
    x, twin = (torch.linspace(-1, 1, 3000, requires_grad=True) for _ in range(2))
    for _ in range(3):
        loss = compiled(x, offload)
        settle(offload)
        assert offload.stats().saved > 0
        loss.backward()
        compiled(twin, None).backward()
    assert_same([x.grad], [twin.grad])
    assert offload.stats().read > 0


def test_context_inside_of_one_whole_graph_is_refused_by_the_compiler(offload: ActivationOffload) -> None:
    def part(x: Tensor) -> Tensor:
        with offload:
            return (x * 2).sin().sum()

    with pytest.raises(Unsupported, match="does not know how to enter a `ActivationOffload` context manager"):
        torch.compile(part, backend="eager", fullgraph=True)(torch.ones(5, requires_grad=True))
