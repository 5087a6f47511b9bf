"""Triton's kernels compute only where they have given PyTorch's bits: tried with others that differ, or raise."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from narrowgauge import kernels
from narrowgauge.offload.codecs import mesa_rounding
from narrowgauge.optimizers.layers.selected_weight import gathers_alike
from narrowgauge.optimizers.numerics.rounding import rounds_alike, stochastic_round_
from tests.support.kernels import triton_module

CPU = torch.device("cpu")
SEED = 2**62 + 12345  # rounds_alike's


def gather(full: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return full.index_select(1, index).to(dtype)


def round_(target: Tensor, source: Tensor, *, key: int, offset: int | Tensor) -> None:
    stochastic_round_(target, source, seed=SEED, offset=offset)


def one_off(target: Tensor, source: Tensor, *, key: int, offset: int | Tensor) -> None:
    round_(target, source, key=key, offset=offset)
    target.view(torch.int16)[3] += 1


def to_nearest(codes: Tensor, tensor: Tensor, noise: Tensor, *others: Any) -> None:
    mesa_rounding.encode(codes, tensor, torch.full_like(noise, 0.5), *others)


def as_saved(values: Tensor, codes: Tensor, step: Tensor, low: Tensor, dim: int, width: int) -> None:
    mesa_rounding.decode(values, codes, step, low.roll(1), dim, width)


MESA: dict[str, Any] = {"encode": mesa_rounding.encode, "decode": mesa_rounding.decode}
TRIED: dict[str, tuple[Callable[[], bool], bool]] = {
    "columns": (lambda: gathers_alike(gather, CPU, torch.float32, torch.bfloat16), True),
    "columns-cut": (
        lambda: gathers_alike(lambda *of: gather(*of).nextafter(torch.zeros(())), CPU, torch.float32, torch.float32),
        False,
    ),
    "columns-order": (
        lambda: gathers_alike(lambda x, i, d: gather(x, i.flip(0), d), CPU, torch.half, torch.half),
        False,
    ),
    "rounding": (lambda: rounds_alike(round_, CPU), True),
    "rounding-one-off": (lambda: rounds_alike(one_off, CPU), False),
    "mesa": (lambda: mesa_rounding.rounds_alike(SimpleNamespace(**MESA), CPU, torch.bfloat16), True),
    "mesa-to-nearest": (
        lambda: mesa_rounding.rounds_alike(SimpleNamespace(**{**MESA, "encode": to_nearest}), CPU, torch.float32),
        False,
    ),
    "mesa-groups": (
        lambda: mesa_rounding.rounds_alike(SimpleNamespace(**{**MESA, "decode": as_saved}), CPU, torch.float16),
        False,
    ),
}


@pytest.mark.parametrize(("tried", "expected"), [pytest.param(*case, id=name) for name, case in TRIED.items()])
def test_a_kernel_that_differs_is_found(tried: Callable[[], bool], expected: bool) -> None:
    assert tried() is expected


def test_tritons_kernels_agree() -> None:
    """Under the interpreter, which does not round casts to bf16."""
    columns, rounding, mesa = (
        triton_module(f"narrowgauge.{name}_triton", "cpu")
        for name in ("optimizers.layers.columns", "optimizers.numerics.rounding", "offload.codecs.mesa")
    )
    assert gathers_alike(columns.gather_columns, CPU, torch.float32, torch.float32)
    assert gathers_alike(columns.gather_columns, CPU, torch.bfloat16, torch.bfloat16)
    assert rounds_alike(rounding.round_, CPU)
    assert mesa_rounding.rounds_alike(mesa, CPU, torch.float32)


@pytest.mark.parametrize("found", [False, RuntimeError("no compiler\nat line 3")], ids=["differs", "raises"])
def test_what_is_not_right_is_told_once_and_not_tried_again(found: Any) -> None:
    calls: list[Any] = []

    def agrees(*arguments: Any) -> bool:
        calls.append(arguments)
        if isinstance(found, Exception):
            raise found
        return found

    name = f"columns of {type(found).__name__}"
    got = "RuntimeError: no compiler" if isinstance(found, Exception) else "others"
    with pytest.warns(UserWarning, match=f"^{name}: expected PyTorch's .* on cpu, got {got}; PyTorch computes$"):
        assert not kernels.is_right(name, CPU, agrees, torch.half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.is_right(name, CPU, agrees, torch.half)
        # Another variant is tried, and nothing is said a second time.
        assert not kernels.is_right(name, CPU, agrees, torch.float)
        assert kernels.is_right(name, CPU, lambda device, dtype: True, torch.double)
    assert calls == [(CPU, torch.half), (CPU, torch.float)]


def test_tensors_without_memory_are_not_given_to_kernels() -> None:
    """A forecast's tensors on CUDA, DTensors and other classes."""

    def agrees(device: torch.device) -> bool:
        raise AssertionError("tried")

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(3, device="cuda")
    assert fake.is_cuda
    assert not kernels.computes("x", fake, agrees)
    assert not kernels.computes("x", torch.empty(3), agrees)
