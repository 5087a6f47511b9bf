"""Offload changes no bit of a loss or a gradient, whatever is saved, and keeps nothing that autograd let go of."""

import copy
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from narrowgauge.offload import ActivationOffload, OffloadError, OffloadSpaceError
from narrowgauge.offload.backends import aio
from narrowgauge.offload.planner import Forward, Saved, absorbable_shares
from narrowgauge.offload.stats import Endurance
from narrowgauge.offload.storage.slab import ALIGNMENT, round_up
from tests.offload.support import (
    GatedBackend,
    Loss,
    assert_nothing_left,
    assert_same,
    compare,
    copies,
    grads_of,
    level,
    new_offload,
    settle,
    wait_until,
)
from tests.support.models import tiny, token_batch


@pytest.fixture(scope="module")
def shared() -> Iterator[list[ActivationOffload]]:
    made: list[ActivationOffload] = []
    yield made
    for offload in made:
        offload.close()


@pytest.fixture
def offload(shared: list[ActivationOffload], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActivationOffload]:
    """One for all tests, as in a long run; each has to leave it empty."""
    if not shared:
        shared.append(new_offload(tmp_path_factory.mktemp("slab")))
    offload = shared[0]
    try:
        yield offload
        assert_nothing_left(offload)
    except BaseException:
        shared.clear()
        raise


@pytest.fixture(scope="module")
def one_lane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ActivationOffload, GatedBackend]]:
    backend = GatedBackend()
    offload = new_offload(tmp_path_factory.mktemp("slab"), backend=backend, num_lanes=1)
    yield offload, backend
    offload.close()


@pytest.fixture
def gated(one_lane: tuple[ActivationOffload, GatedBackend]) -> Iterator[tuple[ActivationOffload, GatedBackend]]:
    """One lane, whose writes can be held up."""
    yield one_lane
    offload, backend = one_lane
    backend.gate.set()
    assert_nothing_left(offload)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()


def cubes(*parts: Tensor) -> Tensor:
    """A loss that saves just its arguments."""
    return torch.stack([part.pow(3).sum() for part in parts]).sum()


def chain(x: Tensor, length: int = 8) -> Tensor:
    """Saves ``length`` tensors of the size of ``x``, each from the one before."""
    for _ in range(length):
        x = (x * 1.25).sin()
    return x.sum()


# What is saved.

VIEWS: dict[str, Loss] = {
    "whole": lambda h: cubes(h),
    "slice": lambda h: cubes(h[3:40, 5:]),
    "step": lambda h: cubes(h[::3, 1::2]),
    "row": lambda h: cubes(h[17]),
    "overlapping": lambda h: cubes(h[:40], h[20:]),
    "disjoint": lambda h: cubes(h[:30], h[30:]),
    "view of a view": lambda h: cubes(h.view(-1)[100:4100].view(40, 100).t()[3:]),
    "offset": lambda h: cubes(h.view(-1)[1001:]),
    "expanded": lambda h: cubes(h[:, :1].expand(64, 96)),
    "expanded in front": lambda h: cubes(h[5].expand(7, 96)),
    "strided overlap": lambda h: cubes(h.as_strided((60, 8), (3, 1), 5)),
    "unfold": lambda h: cubes(h.unfold(1, 10, 3)),
    "transposed": lambda h: cubes(h.t()),
    "permuted": lambda h: cubes(h.view(4, 16, 96).permute(2, 0, 1)),
    "diagonal": lambda h: cubes(h.diagonal(3)),
    "chunks": lambda h: cubes(*h.chunk(3, dim=1)),
    "split and unbind": lambda h: cubes(*h.split([10, 54]), *h.unbind()[:3]),
    "detached": lambda h: cubes(h) + (h * h.detach()).sum(),
    "saved by four": lambda h: cubes(h, h) + (h * h).sum() + h.sin().sum(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_the_same_bits_and_their_storage_is_stored_once(offload: ActivationOffload, name: str) -> None:
    traffic = compare(offload, lambda x: VIEWS[name](x * 2), leaf(64, 96))
    # A detached tensor is not seen to share its storage's counter.
    storages = 2 if name == "detached" else 1
    traffic.assert_written_and_read(storages * 64 * 96 * 4, storages)


def test_fused_projection_is_stored_once(offload: ActivationOffload) -> None:
    weight = nn.Parameter(leaf(16, 48, seed=1).detach())

    def function(x: Tensor) -> Tensor:
        q, k, v = ((x * 2) @ weight).chunk(3, dim=1)
        return (torch.softmax(q @ k.t(), -1) @ v).sum()

    traffic = compare(offload, function, leaf(32, 16))
    hidden, fused, probabilities = 32 * 16, 32 * 48, 32 * 32
    traffic.assert_written_and_read(4 * (hidden + fused + probabilities), storages=3)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: cubes(h.contiguous(memory_format=torch.channels_last)),
        lambda h: cubes(h.contiguous(memory_format=torch.channels_last)[:, 1:4, ::2]),
        lambda h: F.conv2d(h.contiguous(memory_format=torch.channels_last).sin(), torch.ones(2, 6, 3, 3)).pow(2).sum(),
        lambda h: F.max_pool2d(h.contiguous(memory_format=torch.channels_last).sin(), 2).pow(2).sum(),
    ],
)
def test_channels_last(offload: ActivationOffload, function: Loss) -> None:
    compare(offload, lambda x: function(x * 2), leaf(4, 6, 8, 10)).assert_everything_moved()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floating_point_dtypes(offload: ActivationOffload, dtype: torch.dtype) -> None:
    traffic = compare(offload, lambda x: cubes(x / 4), leaf(33, 17, dtype=dtype))
    traffic.assert_written_and_read(33 * 17 * dtype.itemsize, storages=1)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_with_conjugate_and_negative_views(offload: ActivationOffload, dtype: torch.dtype) -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 2
        return (h.pow(3).abs() + (h * h.conj()).real + (h.conj().imag * h.imag)).sum()

    traffic = compare(offload, function, leaf(20, 30, dtype=dtype))
    assert traffic.written >= 2 * 600 * dtype.itemsize
    assert traffic.read > 0


def masked(x: Tensor) -> Tensor:
    h = x * 2
    return h.masked_fill(h > 0, 0.0).sum()


def sorted_and_gathered(x: Tensor) -> Tensor:
    h = x * 2
    return h.gather(0, h.argsort(0)[: x.shape[0] // 2 + 1]).sum()


@pytest.mark.parametrize("size", [1, 3, 511, 512, 513, 4095, 4096, 4097, 12289])
@pytest.mark.parametrize(("function", "itemsize"), [(masked, 1), (sorted_and_gathered, 12)])
def test_masks_and_indices_of_odd_sizes(offload: ActivationOffload, function: Loss, itemsize: int, size: int) -> None:
    traffic = compare(offload, function, leaf(size))
    if itemsize == 1:
        traffic.assert_written_and_read(size, storages=1)
    else:
        # The indices come with the sorted values, which backward drops without asking; they may have been read ahead.
        assert (traffic.saved, traffic.kept, traffic.forwarded) == (size * itemsize, 0, 0)
        assert 0 < traffic.read <= traffic.written


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1023, 1025, 4099])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_that_are_no_multiple_of_a_block(offload: ActivationOffload, size: int, dtype: torch.dtype) -> None:
    traffic = compare(offload, lambda x: cubes(x * 2), leaf(size, dtype=dtype))
    traffic.assert_written_and_read(size * dtype.itemsize, storages=1)


@pytest.mark.parametrize("offset", [0, 1, 3, 511, 513, 4095])
@pytest.mark.parametrize("size", [1, 510, 4097, 9000])
def test_memory_at_odd_addresses(offload: ActivationOffload, offset: int, size: int) -> None:
    content = torch.arange(offset + size, dtype=torch.int64).remainder(3).eq(0).to(torch.uint8).numpy().tobytes()

    def function(x: Tensor) -> Tensor:
        mask = torch.frombuffer(bytearray(content), dtype=torch.bool, offset=offset, count=size)
        return (x * 2).masked_fill(mask, 0.0).sum()

    compare(offload, function, leaf(size)).assert_written_and_read(size, storages=1)


def test_floats_at_addresses_that_are_no_multiple_of_sixteen(offload: ActivationOffload) -> None:
    content = leaf(1001).detach().numpy().tobytes()

    def function(x: Tensor) -> Tensor:
        factor = torch.frombuffer(bytearray(content), dtype=torch.float32, offset=4)
        return (x * factor).sum()

    compare(offload, function, leaf(1000)).assert_written_and_read(4000, storages=1)


def test_scalars_and_tensors_without_elements(offload: ActivationOffload) -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 2
        return cubes(h.sum(), h[:0], h.new_zeros(0, 5) * h.sum(), h[0, 0], h[2:2, 3:3].clone())

    compare(offload, function, leaf(20, 30)).assert_everything_moved()


def test_indices_of_embeddings_and_classes(offload: ActivationOffload) -> None:
    def function(table: Tensor) -> Tensor:
        tokens = torch.arange(200).remainder(37).view(4, 50)
        rows = F.embedding(tokens + 0, table)
        return F.cross_entropy(rows.flatten(0, 1), (tokens.flatten() * 7).remainder(12))

    compare(offload, function, leaf(37, 12)).assert_everything_moved()


def test_leaves_that_are_held_are_written_but_taken_from_memory(offload: ActivationOffload) -> None:
    traffic = compare(offload, lambda a, b: (a @ b).sum(), leaf(30, 40), leaf(40, 50))
    assert traffic.saved == 4 * (30 * 40 + 40 * 50)
    assert traffic.written >= traffic.saved
    assert traffic.read == 0
    assert traffic.forwarded == traffic.saved


class Cubed(torch.autograd.Function):
    """Saves its input, an intermediate and its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        square = x * x
        cube = square * x * factor
        ctx.save_for_backward(x, factor, square, cube)
        return cube

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        x, factor, square, cube = ctx.saved_tensors
        return grad * 3 * square * factor, (grad * cube / factor + 0 * x).sum(0)


def test_custom_function_saving_inputs_intermediates_and_outputs(offload: ActivationOffload) -> None:
    def function(x: Tensor, factor: Tensor) -> Tensor:
        return Cubed.apply(x * 2, factor * 2).sum()  # type: ignore[union-attr]

    traffic = compare(offload, function, leaf(50, 30), leaf(30, seed=1))
    traffic.assert_written_and_read(4 * (3 * 50 * 30 + 30), storages=4)


class SavedAsGradient(torch.autograd.Function):
    """Its gradient is a saved tensor itself, not a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return (x * factor).sum()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return factor, None


@pytest.mark.parametrize("done", [True, False])
def test_gradient_that_is_a_saved_tensor_is_not_added_to_in_place(offload: ActivationOffload, done: bool) -> None:
    """Autograd may make such a gradient ``x.grad`` without a copy; what it adds there is not in the saved tensor."""

    def forward(x: Tensor) -> Any:
        with offload:
            return SavedAsGradient.apply(x, torch.arange(2000.0) + 1)

    x = leaf(2000)
    loss = forward(x)
    if done:
        settle(offload)
    for _ in range(3):
        loss.backward(retain_graph=True)
    grad = x.grad
    del x, loss
    assert grad is not None
    assert torch.equal(grad, 3 * (torch.arange(2000.0) + 1))


@pytest.mark.parametrize("done", [True, False])
def test_gradient_does_not_share_memory_with_what_is_still_held(offload: ActivationOffload, done: bool) -> None:
    x, factor = leaf(2000), torch.arange(2000.0)
    with offload:
        loss: Any = SavedAsGradient.apply(x, factor)
    if done:
        settle(offload)
    loss.backward()
    assert x.grad is not None
    x.grad.zero_()
    assert torch.equal(factor, torch.arange(2000.0))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: (F.relu_(h * 3) * 2).sum(),
        lambda h: F.linear(F.relu_(h.sin()), torch.ones(5, 96)).pow(2).sum(),
        lambda h: F.dropout(h.sin(), 0.4, inplace=True).pow(2).sum(),
        lambda h: h.sin().mul_(2).add_(1).pow(2).sum(),
        lambda h: torch.sigmoid_(h + 1).sum(),
        lambda h: F.layer_norm(h, (96,)).pow(3).sum(),
        lambda h: h.clone().index_put_((torch.tensor([1, 5]),), h[:2] * 2).pow(2).sum(),
    ],
)
def test_legal_in_place_operations(offload: ActivationOffload, function: Loss) -> None:
    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return function(x * 2)

    assert compare(offload, seeded, leaf(64, 96)).saved > 0


@pytest.mark.parametrize("inplace", [True, False])
def test_dropout(offload: ActivationOffload, inplace: bool) -> None:
    def function(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return cubes(F.dropout(x * 2, 0.3, inplace=inplace))

    compare(offload, function, leaf(64, 96)).assert_everything_moved()


def test_buffers_that_forward_updates_without_counting(offload: ActivationOffload) -> None:
    """Batch norm saves its running statistics, and writes to them behind the version counter's back."""

    def train(use: ActivationOffload | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4096), nn.BatchNorm1d(4096), nn.Tanh())
        losses = []
        for step in range(12):
            x = leaf(4, 8, seed=step)
            if use is not None:
                with use:
                    losses.append(model(x).pow(2).sum())
            else:
                losses.append(model(x).pow(2).sum())
        torch.stack(losses).sum().backward()
        return [*(loss.detach() for loss in losses), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert_same(train(offload), train(None))


def test_nested_tensors_of_other_layouts_are_left_alone(offload: ActivationOffload) -> None:
    def function(x: Tensor) -> Tensor:
        sparse = torch.eye(30).to_sparse()
        return torch.sparse.mm(sparse, x * 2).pow(2).sum()

    assert compare(offload, function, leaf(30, 20)).written >= 4 * 600


# Versions.


def save_whole(h: Tensor) -> Tensor:
    return h.pow(3).sum()


def save_view(h: Tensor) -> Tensor:
    return h[3:20].pow(3).sum()


def change_whole(h: Tensor) -> None:
    h.detach().add_(1)


def change_view(h: Tensor) -> None:
    h[30:].zero_()


def change_elsewhere(h: Tensor) -> None:
    h.view(-1)[5:6].mul_(2)


def versions_in(error: pytest.ExceptionInfo[RuntimeError]) -> str:
    return str(error.value).partition("is at version")[2].partition("Hint")[0]


def assert_refused(loss: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as found:
        loss.backward()
    assert versions_in(found) == message
    assert not isinstance(found.value, OffloadError)


@pytest.mark.parametrize("when", ["done", "under way", "queued"])
@pytest.mark.parametrize("save", [save_whole, save_view])
@pytest.mark.parametrize("change", [change_whole, change_view, change_elsewhere])
def test_changed_after_saving_is_refused_as_without_offload(
    gated: tuple[ActivationOffload, GatedBackend], when: str, save: Any, change: Any
) -> None:
    offload, backend = gated
    h = leaf(40, 50) * 2
    loss = save(h)
    change(h)
    with pytest.raises(RuntimeError) as expected:
        loss.backward()
    message = versions_in(expected)
    del expected

    if when != "done":
        backend.gate.clear()
    first = leaf(5) * 2
    h = leaf(40, 50) * 2
    with offload:
        other = cubes(first) if when == "queued" else None
        loss = save(h)
    if when == "done":
        settle(offload)
    change(h)
    assert_refused(loss, message)
    del h
    backend.gate.set()
    settle(offload)
    assert_refused(loss, message)
    del loss, other, first


def test_changed_parameter_is_refused(offload: ActivationOffload) -> None:
    parameter = nn.Parameter(leaf(40, 50).detach())
    with offload:
        losses = [parameter.pow(3).sum(), (leaf(3, 50) @ parameter.t()).sum()]
    with torch.no_grad():
        parameter.add_(1)
    for loss in losses:
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace operation.*is at version 1; expected version 0"
        ):
            loss.backward()


def test_saved_again_after_a_counted_change_has_the_new_bytes(offload: ActivationOffload) -> None:
    def function(x: Tensor) -> Tensor:
        buffer = torch.zeros(1000)
        parts = []
        for step in range(5):
            buffer = buffer + step
            parts.append((x * buffer).sum())
            # Of no use to the part before, whose buffer was another.
            buffer = buffer.clone().mul_(1.5)
            parts.append((x * buffer).sum())
        return torch.stack(parts).sum()

    compare(offload, function, leaf(1000)).assert_everything_moved()


@pytest.mark.parametrize("wait", [True, False])
def test_data_alias_that_was_changed_is_stored_anew(offload: ActivationOffload, wait: bool) -> None:
    """``.data`` has a counter of its own: that of the tensor saved before says nothing about it."""
    x = leaf(1000)
    with offload:
        factor = torch.arange(1000.0)
        first = (leaf(1000) * factor).sum()
        if wait:
            settle(offload)
        alias = factor.data
        alias.add_(1)
        second = (x * alias).sum()
    del factor, alias
    settle(offload)
    second.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(1000.0) + 1)
    del first


@pytest.mark.xfail(strict=True, reason="what no counter counts is not seen; autograd does not see it either")
def test_changed_through_data_and_saved_again(offload: ActivationOffload) -> None:
    x = leaf(1000)
    with offload:
        factor = torch.arange(1000.0)
        first = (leaf(1000) * factor).sum()
        settle(offload)
        factor.data.add_(1)
        second = (x * factor).sum()
    del factor
    settle(offload)
    second.backward()
    grad = x.grad
    del x, first, second
    assert grad is not None
    assert torch.equal(grad, torch.arange(1000.0) + 1)


def test_addresses_that_are_used_again_are_not_mixed_up(offload: ActivationOffload) -> None:
    x, addresses, expected = leaf(2000), [], torch.zeros(2000)
    losses = []
    for step in range(200):
        factor = torch.full((2000,), float(step))
        addresses.append(factor.data_ptr())
        with offload:
            losses.append((x * factor).sum())
        expected += factor
        del factor
        if step % 3:
            settle(offload)
    assert len(set(addresses)) < len(addresses), "the allocator used no address twice: nothing was tested"
    torch.stack(losses).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


# Ways to go backward.


def test_forward_memory_is_given_up_once_it_is_written(offload: ActivationOffload) -> None:
    with offload:
        h = leaf(1000) * 2
        alive = weakref.ref(h.untyped_storage())
        loss = cubes(h)
    del h
    settle(offload)
    assert alive() is None
    assert level(offload)[1:] == (4000, 0)
    loss.backward()


def test_nothing_is_read_of_what_is_still_being_written(gated: tuple[ActivationOffload, GatedBackend]) -> None:
    offload, backend = gated
    backend.gate.clear()
    traffic = compare(offload, chain, leaf(3000), wait=False)
    assert traffic.read == 0
    assert traffic.forwarded == traffic.saved == 8 * 12000


def test_without_waiting_some_come_from_memory_and_some_from_disk(offload: ActivationOffload) -> None:
    traffic = compare(offload, lambda x: chain(x, 40), leaf(30_000), wait=False)
    assert traffic.forwarded + traffic.read >= traffic.saved


def test_backward_twice_reads_twice_and_keeps_nothing_between(offload: ActivationOffload) -> None:
    x, twin = leaf(5000), leaf(5000)
    loss = chain(twin)
    for _ in range(3):
        loss.backward(retain_graph=True)
    before = offload.stats()
    with offload:
        loss = chain(x)
    settle(offload)
    for times in range(1, 4):
        loss.backward(retain_graph=True)
        wait_until(lambda: offload.stats().resident == 0, "a buffer is kept")
        stats = offload.stats()
        assert stats.saved == 8 * 20000
        assert stats.read - before.read == times * (stats.written - before.written)
    assert_same([x.grad], [twin.grad])


def test_backward_twice_of_what_was_never_written(gated: tuple[ActivationOffload, GatedBackend]) -> None:
    offload, backend = gated
    x, twin = leaf(5000), leaf(5000)
    loss = chain(twin)
    backend.gate.clear()
    with offload:
        offloaded = chain(x)
    for _ in range(2):
        loss.backward(retain_graph=True)
        offloaded.backward(retain_graph=True)
        backend.gate.set()
    assert_same([x.grad], [twin.grad])


def test_memory_of_backward_is_bounded_by_the_buffers(tmp_path: Path) -> None:
    offload = new_offload(tmp_path, buffer_bytes=4 * 68 << 10)
    with offload:
        loss = chain(leaf(16 << 10), 32)
    settle(offload)
    assert offload.stats().saved == 32 * 64 << 10
    offload.reset_peaks()
    loss.backward()
    assert offload.stats().resident_peak <= 5 * 68 << 10
    assert_nothing_left(offload)
    offload.close()


@pytest.mark.parametrize("inside", [True, False])
def test_gradient_penalty(offload: ActivationOffload, inside: bool) -> None:
    def penalty(y: Tensor, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return (grad.norm(dim=1) - 1).pow(2).mean() + y.pow(2).mean()

    def run(use: ActivationOffload | None) -> list[Tensor | None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.SiLU(), nn.Linear(30, 1))
        x = leaf(40, 20)
        if use is None:
            loss = penalty(model(x * 2), x)
        elif inside:
            with use:
                loss = penalty(model(x * 2), x)
            settle(use)
        else:
            with use:
                y = model(x * 2)
            settle(use)
            loss = penalty(y, x)
        loss.backward()
        return [loss.detach(), *grads_of([x, *model.parameters()])]

    before = offload.stats()
    assert_same(run(offload), run(None))
    assert offload.stats().read > before.read


def test_third_derivative(offload: ActivationOffload) -> None:
    def function(x: Tensor) -> Tensor:
        y = (x * 2).sin().pow(3).sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
            y = grad.pow(2).sum()
        return y

    compare(offload, function, leaf(700, dtype=torch.float64))


def test_branch_that_is_never_used_is_dropped_with_its_graph(offload: ActivationOffload) -> None:
    x, twin = leaf(3000), leaf(3000)
    with offload:
        h = x * 2
        used, unused = chain(h), chain(h + 1)
    del h
    settle(offload)
    used.backward()
    assert offload.debug_state().slab_bytes > 0
    del unused
    assert_nothing_left(offload)
    chain(twin * 2).backward()
    assert_same([x.grad], [twin.grad])


def test_part_of_the_inputs_only(offload: ActivationOffload) -> None:
    x = [leaf(3000, seed=n) for n in range(3)]
    twin = copies(x)
    with offload:
        loss = chain(x[0] * x[1]) * chain(x[2])
    settle(offload)
    found = torch.autograd.grad(loss, x[2], retain_graph=True) + torch.autograd.grad(loss, x[:2])
    loss = chain(twin[0] * twin[1]) * chain(twin[2])
    assert_same(found, [torch.autograd.grad(loss, twin)[n] for n in (2,)] + list(reversed_grads(twin)))


def reversed_grads(twin: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(chain(twin[0] * twin[1]) * chain(twin[2]), list(twin[:2]))


def test_clean_step_after_an_exception_between_forward_and_backward(offload: ActivationOffload) -> None:
    def fail(x: Tensor) -> None:
        with offload:
            loss = chain(x * 2)
        settle(offload)
        raise KeyError(str(loss))

    with pytest.raises(KeyError):
        fail(leaf(3000))
    assert_nothing_left(offload)
    compare(offload, lambda x: chain(x * 2), leaf(3000)).assert_everything_moved()


def test_clean_step_after_an_exception_in_forward(offload: ActivationOffload) -> None:
    def fail(x: Tensor) -> None:
        with offload:
            loss = chain(x * 2)
            raise KeyError(str(loss))

    with pytest.raises(KeyError):
        fail(leaf(3000))
    assert_nothing_left(offload)
    before = offload.stats().saved
    outside = chain(leaf(3000))
    assert offload.stats().saved == before
    outside.backward()
    compare(offload, lambda x: chain(x * 2), leaf(3000)).assert_everything_moved()


def test_clean_step_after_an_exception_in_backward(offload: ActivationOffload) -> None:
    def fail(_: Tensor) -> Tensor:
        raise KeyError("in backward")

    x = leaf(3000)
    with offload:
        middle = (x * 2).sin()
        middle.register_hook(fail)
        loss = chain(middle)
    del middle
    settle(offload)
    with pytest.raises(KeyError):
        loss.backward()
    del loss
    assert_nothing_left(offload)
    compare(offload, lambda x: chain(x * 2), leaf(3000)).assert_everything_moved()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_stores_nothing(offload: ActivationOffload, mode: Any) -> None:
    model = tiny().eval()
    before = offload.stats()
    with offload, mode():
        loss = model(token_batch(0, 4))
    assert (offload.stats().saved, offload.stats().written) == (0, before.written)
    with torch.no_grad():
        assert torch.equal(loss, model(token_batch(0, 4)))


def test_nested_contexts_of_one_and_of_two(offload: ActivationOffload, tmp_path: Path) -> None:
    other = new_offload(tmp_path)

    def nested(x: Tensor) -> Tensor:
        a = chain(x * 2)
        with offload:
            b = chain(x * 3)
            with other:
                c = chain(x * 4)
            d = chain(x * 5)
        return a + b + c + d

    compare(offload, nested, leaf(3000)).assert_everything_moved()
    assert other.stats().written >= 8 * 12000
    assert_nothing_left(other)
    other.close()


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_users_own_hooks(offload: ActivationOffload, order: str) -> None:
    """Torch calls the innermost hooks only."""

    def inside(x: Tensor) -> Tensor:
        with save_on_cpu():
            a = chain(x * 2)
        return a + chain(x * 3, 4)

    def outside(x: Tensor) -> Tensor:
        with save_on_cpu():
            a = chain(x * 2)
            with offload:
                return a + chain(x * 3, 4)

    traffic = compare(offload, inside if order == "inside" else outside, leaf(3000))
    # Without offload, "outside" goes through it just the same.
    times = 1 if order == "inside" else 2
    assert traffic.written <= times * 4 * (12288 + ALIGNMENT)
    assert traffic.read > 0


def train_in_order(use: ActivationOffload | None, order: str) -> list[Tensor | None]:
    """Micro-batches whose forwards (``F``) and backwards (``B``) come in the given order."""
    model = tiny()
    losses: dict[str, Tensor] = {}
    values = []
    for action in order.split():
        kind, number = action[0], action[1:]
        if kind == "F" and use is not None:
            with use:
                losses[number] = model(token_batch(int(number), 4))
            settle(use)
        elif kind == "F":
            losses[number] = model(token_batch(int(number), 4))
        else:
            loss = losses.pop(number)
            loss.backward()
            values.append(loss.detach())
    return [*values, *grads_of(list(model.parameters()))]


@pytest.mark.parametrize(
    "order",
    [
        "F0 B0 F1 B1",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 F1 B1 B0",
        "F0 F1 F2 F3 B0 B1 B2 B3",
        "F0 F1 F2 F3 F4 F5 B5 B4 B3 B2 B1 B0",
        "F0 F1 F2 B1 F3 B0 B3 B2",
    ],
)
def test_micro_batches_in_flight(offload: ActivationOffload, order: str) -> None:
    before = offload.stats()
    assert_same(train_in_order(offload, order), train_in_order(None, order))
    assert offload.stats().read > before.read


def test_one_backward_of_the_sum_of_several_forwards(offload: ActivationOffload) -> None:
    x, twin = leaf(3000), leaf(3000)
    losses = []
    for step in range(5):
        with offload:
            losses.append(chain(x * (step + 1)))
    settle(offload)
    torch.stack(losses).sum().backward()
    torch.stack([chain(twin * (step + 1)) for step in range(5)]).sum().backward()
    assert_same([x.grad], [twin.grad])


def test_one_forward_in_several_contexts(offload: ActivationOffload) -> None:
    x, twin = leaf(3000), leaf(3000)
    h = x * 2
    for _ in range(4):
        with offload:
            h = (h * 1.25).sin()
    settle(offload)
    h.sum().backward()
    chain(twin * 2, 4).backward()
    assert_same([x.grad], [twin.grad])


def test_backward_inside_of_the_context(offload: ActivationOffload) -> None:
    model, twin = tiny(), tiny()
    for step in range(3):
        with offload:
            loss = model(token_batch(step, 4))
            settle(offload)
            loss.backward()
        twin(token_batch(step, 4)).backward()
    assert_same(grads_of(list(model.parameters())), grads_of(list(twin.parameters())))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts(offload: ActivationOffload, reentrant: bool) -> None:
    def function(x: Tensor) -> Tensor:
        h = (x * 2).sin()
        for _ in range(3):
            h = checkpoint(lambda t: (t * 2).sin().exp().cos(), h, use_reentrant=reentrant)
            assert isinstance(h, Tensor)
        return cubes(h)

    compare(offload, function, leaf(3000)).assert_everything_moved()


def test_from_other_threads_at_the_same_time(offload: ActivationOffload) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(15):
                x, twin = leaf(3000, seed=seed), leaf(3000, seed=seed)
                with offload:
                    loss = chain(x * (step + 1))
                if step % 2:
                    settle(offload)
                loss.backward()
                chain(twin * (step + 1)).backward()
                assert_same([x.grad], [twin.grad])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_forward_in_one_thread_and_backward_in_another(offload: ActivationOffload) -> None:
    x, twin = leaf(3000), leaf(3000)
    losses: list[Tensor] = []

    def forward() -> None:
        with offload:
            losses.append(chain(x * 2))

    for target in (forward, lambda: settle(offload), lambda: losses.pop().backward()):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    chain(twin * 2).backward()
    assert_same([x.grad], [twin.grad])


def test_context_of_one_thread_is_not_that_of_another(offload: ActivationOffload) -> None:
    with offload:
        thread = threading.Thread(target=lambda: kept.append(chain(leaf(3000))))
        kept: list[Tensor] = []
        thread.start()
        thread.join()
    assert offload.stats().saved == 0


# Parameters and models.


class Tied(nn.Module):
    """Uses its parameters as they are, transposed, cut and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(leaf(30, 40).detach()), nn.Parameter(leaf(40, seed=1).detach())
        self.frozen = nn.Parameter(leaf(40, 30, seed=2).detach(), requires_grad=False)
        self.again = self.weight

    def forward(self) -> Tensor:
        products = [
            self.weight @ self.again.t(),
            self.weight.t() @ self.frozen.t()[:, :40],
            self.weight.view(-1)[5:45] * self.bias,
            self.weight[3:4].expand(2, 40) * self.bias,
            self.weight.chunk(2)[1] * self.bias,
        ]
        return torch.stack([product.sum() for product in products]).sum()


def test_parameters_are_never_written(offload: ActivationOffload) -> None:
    model, twin = Tied(), Tied()
    before = offload.stats()
    with offload:
        loss = model()
    settle(offload)
    loss.backward()
    twin().backward()
    assert offload.stats().written == before.written
    assert_same(grads_of(list(model.parameters())), grads_of(list(twin.parameters())))


def test_detached_parameters_of_a_model_that_was_named_are_never_written(tmp_path: Path) -> None:
    model = Tied()
    offload = new_offload(tmp_path, model=model)
    with offload:
        loss = (leaf(3, 30) @ model.weight.detach()).sum() + (leaf(3, 40) * model.bias.data).sum()
    assert offload.stats().saved == 0
    del loss
    offload.close()


@pytest.mark.parametrize("autocast", [True, False])
def test_training_a_transformer(offload: ActivationOffload, autocast: bool) -> None:
    def train(use: ActivationOffload | None) -> list[Tensor | None]:
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(6):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if use is None:
                    loss = model(token_batch(step, 4))
                else:
                    with use:
                        loss = model(token_batch(step, 4))
                    settle(use)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return [*losses, *(p.detach() for p in model.parameters())]

    before = offload.stats()
    assert_same(train(offload), train(None))
    assert offload.stats().read > before.read


def test_thousand_steps_leave_nothing(tmp_path: Path) -> None:
    gc.collect()

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    outside = descriptors(), threading.active_count()
    offload = new_offload(tmp_path)
    inside = descriptors(), threading.active_count()
    x, twin = leaf(50), leaf(50)

    def step(number: int) -> None:
        with offload:
            loss = chain(x * (number % 7), 3)
        if number % 50 == 0:
            settle(offload)
        if number % 10:
            loss.backward()

    for number in range(1000):
        step(number)
        if number % 10:
            chain(twin * (number % 7), 3).backward()
    assert_same([x.grad], [twin.grad])
    assert_nothing_left(offload)
    assert (descriptors(), threading.active_count()) == inside
    assert os.listdir(tmp_path) == []
    assert offload.debug_state().offered == 0
    offload.close()
    assert (descriptors(), threading.active_count()) == outside
    assert os.listdir(tmp_path) == []


# Ending.


def test_backward_after_close_is_refused(tmp_path: Path) -> None:
    offload = new_offload(tmp_path)
    with offload:
        loss = chain(leaf(3000))
    settle(offload)
    offload.close()
    offload.close()
    with pytest.raises(OffloadError, match="closed before backward"):
        loss.backward()
    with pytest.raises(OffloadError, match="was closed"), offload:
        pass
    del loss
    assert_nothing_left(offload)


def test_close_inside_of_the_context_leaves_the_rest_in_memory(tmp_path: Path) -> None:
    offload = new_offload(tmp_path)
    x, twin = leaf(3000), leaf(3000)
    with offload:
        offload.close()
        loss = chain(x)
    loss.backward()
    chain(twin).backward()
    assert_same([x.grad], [twin.grad])
    assert offload.stats().written == 0


def test_close_while_writes_are_queued(tmp_path: Path) -> None:
    """What was not written yet is still in memory."""
    backend = GatedBackend()
    offload = new_offload(tmp_path, backend=backend, num_lanes=1)
    x, twin = leaf(3000), leaf(3000)
    backend.gate.clear()
    with offload:
        offloaded = chain(x)
    closing = threading.Thread(target=offload.close)
    closing.start()
    time.sleep(0.05)
    backend.gate.set()
    closing.join()
    # One was under way, and may be gone.
    assert offload.stats().written <= 12288 + ALIGNMENT
    chain(twin).backward()
    if offload.stats().written == 0:
        offloaded.backward()
        assert_same([x.grad], [twin.grad])
    del offloaded
    assert_nothing_left(offload)


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "layers"}, "granularity: expected one of 'saved_tensors', 'layer_inputs', got 'layers'"),
        ({"granularity": "layer_inputs"}, "granularity: 'layer_inputs' needs model="),
        ({"keep_resident": "all"}, "keep_resident: expected 'auto' or a number from 0 to 1, got 'all'"),
        ({"keep_resident": 1.5}, r"keep_resident: expected 'auto' or a number from 0 to 1, got 1\.5"),
        ({"keep_resident": -0.1}, "keep_resident: expected .*, got -0.1"),
        ({"keep_resident": float("nan")}, "keep_resident: expected .*, got nan"),
        ({"num_lanes": 0}, "num_lanes: expected 1 to 64, got 0"),
        ({"buffer_bytes": 0}, "buffer_bytes: expected a number above 0, got 0"),
        ({"io_timeout": -1.0}, r"io_timeout: expected a number above 0, got -1\.0"),
        ({"io_timeout": float("inf")}, "io_timeout: expected a number above 0, got inf"),
        ({"min_tensor_bytes": -1}, "min_tensor_bytes: expected 0 or more, got -1"),
        ({"host_memory_bytes": -1}, "host_memory_bytes: expected 0 or more, got -1"),
        ({"capacity_bytes": 0}, "capacity_bytes: expected a number above 0, got 0"),
        ({"rated_tbw": 0.0}, r"rated_tbw: expected a number above 0, got 0\.0"),
        ({"drive_bytes": -5}, "drive_bytes: expected a number above 0, got -5"),
        ({"max_drive_writes_per_day": 0}, "max_drive_writes_per_day: expected a number above 0, got 0"),
        ({"backend": "fast"}, r"backend: expected one of 'auto', .*'threads'.*, got 'fast'"),
    ],
)
def test_options_out_of_range_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_offload(tmp_path, **options)


def test_paths_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"path: expected at least one folder"):
        new_offload([])
    with pytest.raises(OffloadError, match="nowhere: no such folder"):
        new_offload(tmp_path / "nowhere")
    with pytest.raises(OffloadError, match="file: not a folder"):
        new_offload([tmp_path, tmp_path / "file"])
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OffloadSpaceError, match=r"expected .* bytes free, got"):
        new_offload(tmp_path, capacity_bytes=1 << 55)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_half_of_the_bytes_stay_resident(tmp_path: Path) -> None:
    offload = new_offload(tmp_path, keep_resident=0.5)
    # The first forward is written whole: how much there will be is not known yet.
    compare(offload, lambda x: chain(x, 20), leaf(10_000))
    for _ in range(3):
        traffic = compare(offload, lambda x: chain(x, 20), leaf(10_000))
        assert traffic.saved == 20 * 40_000
        assert traffic.kept == 10 * 40_000
        assert 10 * 40_000 <= traffic.written <= 10 * (round_up(40_000) + ALIGNMENT)
        assert traffic.read == traffic.written
    assert_nothing_left(offload)
    offload.close()


@pytest.mark.parametrize("keep", [1.0, 1])
def test_everything_stays_resident(tmp_path: Path, keep: float) -> None:
    offload = new_offload(tmp_path, keep_resident=keep)
    compare(offload, chain, leaf(10_000))
    assert compare(offload, chain, leaf(10_000)).written == 0
    offload.close()


def test_planned_amount_is_right_too(tmp_path: Path) -> None:
    offload = new_offload(tmp_path, keep_resident="auto")
    for _ in range(12):
        compare(offload, lambda x: chain(x, 20), leaf(10_000), wait=False)
    assert offload.stats().offload_budget is not None
    assert_nothing_left(offload)
    offload.close()


def test_small_tensors_stay_in_memory(tmp_path: Path) -> None:
    offload = new_offload(tmp_path, min_tensor_bytes=8000)
    traffic = compare(offload, lambda x, y: chain(x, 5) * chain(y, 5), leaf(1999), leaf(2000))
    assert traffic.saved >= 5 * 15996
    assert 5 * 8000 <= traffic.written <= 5 * (8192 + ALIGNMENT)
    offload.close()


def test_writes_a_day_are_limited(tmp_path: Path) -> None:
    offload = new_offload(tmp_path, drive_bytes=10**9, max_drive_writes_per_day=1e-3)
    for _ in range(5):
        compare(offload, lambda x: chain(x, 20), leaf(10_000))
    # 1 MB a day
    assert offload.stats().written <= 10_000
    assert offload.stats().drive_life_years is None
    offload.close()


def test_host_memory_is_filled_before_the_disk(tmp_path: Path) -> None:
    offload = new_offload(tmp_path, host_memory_bytes=5 * 40_960)
    for _ in range(3):
        traffic = compare(offload, lambda x: chain(x * 2, 20), leaf(10_000))
        assert traffic.kept == 5 * 40_960
        assert 15 * 40_000 <= traffic.written <= 15 * (40_960 + ALIGNMENT)
        assert_nothing_left(offload)
    offload.close()
    roomy = new_offload(tmp_path, host_memory_bytes=32 << 20)
    assert compare(roomy, lambda x: chain(x * 2, 20), leaf(10_000)).written == 0
    assert_nothing_left(roomy)
    roomy.close()


def test_two_folders_share_the_tensors(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    offload = new_offload(folders)
    x, twin = leaf(10_000), leaf(10_000)
    with offload:
        loss = chain(x, 20)
    settle(offload)
    first, second = (slab.used for slab in offload.debug_state().slabs)
    assert first + second == offload.debug_state().slab_bytes >= 20 * 40_000
    assert abs(first - second) <= 20 * ALIGNMENT
    loss.backward()
    chain(twin, 20).backward()
    assert_same([x.grad], [twin.grad])
    assert_nothing_left(offload)
    offload.close()


def staged_backend() -> GatedBackend:
    """Copies what it writes into a buffer first, as aio and CUDA do."""
    backend = GatedBackend()
    backend.writes_in_place = False
    return backend


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("num_lanes", [1, 4])
def test_buffers_too_small_for_anything(tmp_path: Path, num_lanes: int, staged: bool) -> None:
    options: dict[str, Any] = {"backend": staged_backend()} if staged else {}
    offload = new_offload(tmp_path, num_lanes=num_lanes, buffer_bytes=4096, **options)
    for wait in (True, False):
        for _ in range(10):
            traffic = compare(offload, lambda x: chain(x * 2, 20), leaf(10_000), wait=wait)
            if wait:
                assert traffic.saved == 20 * 40_000
        assert_nothing_left(offload)
    offload.close()


@pytest.mark.parametrize("wait", [True, False])
def test_writes_through_buffers(tmp_path: Path, wait: bool) -> None:
    offload = new_offload(tmp_path, backend=staged_backend(), num_lanes=3, buffer_bytes=128 << 10)
    for _ in range(20):
        traffic = compare(offload, lambda x: chain(x * 2, 20), leaf(10_000), wait=wait)
        if wait:
            traffic.assert_written_and_read(20 * 40_000, storages=20)
    assert_nothing_left(offload)
    offload.close()


def test_full_slab_leaves_the_rest_in_memory(tmp_path: Path) -> None:
    offload = new_offload(tmp_path, capacity_bytes=5 * 45_056)
    for _ in range(3):
        traffic = compare(offload, lambda x: chain(x * 2, 20), leaf(10_000))
        assert 0 < traffic.written <= 5 * 45_056
        assert traffic.kept == 20 * 40_000 - traffic.written // round_up(40_000) * 40_000
        assert_nothing_left(offload)
    assert offload.stats().full > 0
    offload.close()


@pytest.mark.skipif(not aio.is_built(), reason="DeepSpeed's aio extension is not built here")
def test_aio_backend(tmp_path: Path) -> None:
    offload = new_offload(tmp_path, backend="aio")
    for size in (1, 513, 10_000):
        for wait in (True, False):
            traffic = compare(offload, lambda x: chain(x * 2, 20), leaf(size), wait=wait, wait_for_buffers=wait)
            if wait:
                traffic.assert_written_and_read(20 * 4 * size, storages=20)
            assert_nothing_left(offload)
    offload.close()


# Arithmetic.


def profile(*asked: float | None) -> list[Saved]:
    """100 bytes saved every second from 0 on, and asked for at the given times."""
    return [Saved(100, float(second), time) for second, time in enumerate(asked)]


def absorbable(saved: list[Saved], **speeds: Any) -> int:
    """Of one forward, whose backward begins when it asks for the first tensor."""
    asked = [item.unpacked_at for item in saved if item.unpacked_at is not None]
    shares = absorbable_shares([Forward(saved, min(asked, default=0.0))], **speeds)
    return round(shares[None] * sum(item.nbytes for item in saved))


@pytest.mark.parametrize(
    ("asked", "write", "read", "expected"),
    [
        # Effective 100 B/s each way: written when backward begins, at 4.1 s; back at 5.1, 6.1 and 7.1 for three of
        # them, in time; four would be back at 5.1, too late for the last one's 4.1.
        ([7.1, 6.1, 5.2, 4.1], 125.0, 125.0, 300),
        # 50 B/s to write: two are written at 4, three at 6: the third is back at 7, too late for 5.2.
        ([7.1, 6.1, 5.2, 4.1], 62.5, 125.0, 200),
        # 50 B/s to read: one is back at 6.1, two at 6.1 and 8.1.
        ([7.1, 6.05, 5.2, 4.1], 125.0, 62.5, 100),
        # Nothing is fast enough.
        ([7.1, 6.1, 5.2, 4.1], 125.0, 10.0, 0),
        ([7.1, 6.1, 5.2, 4.1], 1.0, 125.0, 0),
        # However fast: not what backward begins with.
        ([7.1, 6.1, 5.2, 4.1], 1e9, 1e9, 300),
        ([50.0, 40.0, 30.0, 20.0], 1e9, 1e9, 300),
        ([50.0, 40.0, 30.0, 20.0, None], 1e9, 1e9, 300),
        # What is never asked for is not read, only written.
        ([7.1, None, 5.2, 4.1], 125.0, 62.5, 200),
        ([None, None], 125.0, 125.0, 0),
        ([], 125.0, 125.0, 0),
    ],
)
def test_planned_bytes(asked: list[float | None], write: float, read: float, expected: int) -> None:
    assert absorbable(profile(*asked), write_bandwidth=write, read_bandwidth=read, window=1000) == expected


def test_planned_bytes_are_limited_by_what_is_read_ahead() -> None:
    """A read takes 1 s; with room for one tensor it begins when the one before was used, not at 10.1 s."""
    saved = profile(20.1, 13.2, 12.6, 12.1, 10.1)
    planned = [
        absorbable(saved, write_bandwidth=1e9, read_bandwidth=125.0, window=window) for window in (100, 200, 400)
    ]
    # Room for one: the fourth is back at 11.1, the third not before 13.1, too late for 12.6; of the first three and
    # of the first two alike, until the second and first are left.
    # Room for two: back at 11.1, 12.1, and, read when the fourth was used, at 13.1.
    assert planned == [200, 400, 400]


def test_planned_bytes_grow_with_the_speed_of_the_disk() -> None:
    saved = [Saved(1000 + 37 * n, 0.1 * n, 12.0 - 0.2 * n) for n in range(30)]
    planned = [
        absorbable(saved, write_bandwidth=speed, read_bandwidth=speed, window=10**6)
        for speed in (1e2, 3e3, 1e4, 3e4, 1e5, 1e9)
    ]
    assert planned == sorted(planned)
    assert planned[0] == 0
    assert sum(item.nbytes for item in saved[:-1]) <= planned[-1]


def test_endurance() -> None:
    """A 1 TB drive rated 600 TBW, written with 2 TB in 4 days."""
    days = [0.0]
    endurance = Endurance(
        drive_bytes=10**12, rated_tbw=600.0, max_drive_writes_per_day=0.75, clock=lambda: 86400 * days[0]
    )
    assert endurance.per_day(5) == 0
    assert endurance.life_years(0) is None
    endurance.start()
    days[0] = 4.0
    endurance.start()
    written = 2 * 10**12
    assert endurance.per_day(written) == pytest.approx(5e11, rel=1e-4)
    assert endurance.drive_writes_per_day(written) == pytest.approx(0.5, rel=1e-4)
    assert endurance.life_years(written) == pytest.approx(1200 / 365.25, rel=1e-4)
    # 3 TB are allowed in 4 days, and 0.75 TB more in the day to come.
    assert endurance.allowance(written, 0.0) == pytest.approx(10**12, rel=1e-4)
    assert endurance.allowance(written, 86400.0) == pytest.approx(1.75e12, rel=1e-4)
    assert endurance.allowance(4 * 10**12, 0.0) == 0
    unlimited = Endurance(drive_bytes=10**12, rated_tbw=None, max_drive_writes_per_day=None)
    unlimited.start()
    assert unlimited.allowance(written, 1.0) is None
    assert unlimited.life_years(written) is None


def test_stats_as_a_dictionary(offload: ActivationOffload) -> None:
    stats = offload.stats().as_dict()
    assert stats["backend"] == "threads"
    assert stats["capacity"] == 64 << 20
    assert stats["failed_writes"] == 0
    assert copy.deepcopy(stats) == stats
