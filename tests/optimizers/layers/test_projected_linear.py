"""The layer that trains a change of its weight within a subspace: gradients, lift and probes against dense products."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrowgauge.optimizers.layers.projected_linear import ProjectedLinear
from narrowgauge.optimizers.layers.unit import ProbeKind

M, N, RANK, TOKENS, SCALE = 9, 14, 4, 11, 0.25
PROBES: list[ProbeKind] = ["rows", "columns", "full"]


def basis_of(kind: str, dim: int) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments that describe a basis, without the side's name, and the basis written out, ``(dim, RANK)``."""
    if kind == "dense":
        basis = torch.randn(dim, RANK, dtype=torch.float64)
        return {"": basis}, basis
    index = torch.tensor([5, 2, 5, 0]) if kind == "repeats" else torch.tensor([7, 1, 3, 4])
    scales = (torch.rand(dim, dtype=torch.float64) + 0.5)[index]
    return {"": scales, "_index": index}, torch.eye(dim, dtype=torch.float64)[:, index] * scales


def layer_of(
    left: str | None, right: str | None, *, bias: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[ProjectedLinear, nn.Linear, Tensor, Tensor]:
    """A layer, the plain one it was made from, and its bases ``(M, .)`` and ``(N, .)`` written out."""
    torch.manual_seed(5)
    dense = nn.Linear(N, M, bias=bias, dtype=dtype)
    bases = {"left": torch.eye(M, dtype=torch.float64), "right": torch.eye(N, dtype=torch.float64)}
    arguments: dict[str, Tensor] = {}
    for side, kind, dim in (("left", left, M), ("right", right, N)):
        if kind is not None:
            given, bases[side] = basis_of(kind, dim)
            arguments |= {side + suffix: value for suffix, value in given.items()}
    layer = ProjectedLinear.convert(copy.deepcopy(dense), **arguments, scale=SCALE)
    with torch.no_grad():
        layer.compact.zero_()
    return layer, dense, bases["left"], bases["right"]


SIDES = [
    ("dense", None),
    (None, "dense"),
    ("dense", "dense"),
    ("selected", None),
    (None, "selected"),
    ("repeats", None),
    (None, "repeats"),
    ("repeats", "dense"),
    ("dense", "repeats"),
]


@pytest.mark.cover(2)
@pytest.mark.parametrize(("left", "right"), SIDES)
@pytest.mark.parametrize("shape", [(N,), (TOKENS, N), (2, 3, 5, N)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_the_dense_ones_projected(
    left: str | None, right: str | None, shape: tuple[int, ...], bias: bool
) -> None:
    layer, dense, a, b = layer_of(left, right, bias=bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, wanted = layer(x), dense(twin)
    assert torch.equal(y, wanted)
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted.backward(grad)
    full = cast(Tensor, dense.weight.grad)
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.compact.grad, a.t() @ full @ b, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer.project_gradient(full), a.t() @ full @ b, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-13, atol=1e-13)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("left", "right"), SIDES)
def test_lift_is_the_scaled_change_whole_or_row_by_row(left: str | None, right: str | None) -> None:
    """Repeated entries carry equal values, as an elementwise optimizer leaves them."""
    layer, _, a, b = layer_of(left, right)
    compact = a.t() @ torch.randn(M, N, dtype=torch.float64) @ b
    expected = SCALE * a @ compact @ b.t()
    torch.testing.assert_close(layer.lift(compact, 0, M), expected, rtol=1e-13, atol=1e-13)
    for first, last in ((0, 4), (4, 5), (5, M), (3, 3)):
        torch.testing.assert_close(layer.lift(compact, first, last), expected[first:last], rtol=1e-13, atol=1e-13)


def test_only_the_projected_input_is_kept_for_backward() -> None:
    for right, width in (("dense", RANK), ("selected", RANK), (None, N)):
        layer, *_ = layer_of("dense" if right is None else None, right)
        y = layer(torch.randn(2, TOKENS, N, dtype=torch.float64))
        kept = [t for t in cast(Any, y.grad_fn).saved_tensors if t is not None and t.dim() == 2]
        shapes = {tuple(t.shape) for t in kept if t is not layer.weight and t is not layer.left}
        assert shapes == {(2 * TOKENS, width)}


def probe_of(kind: ProbeKind, gradient: Tensor, omega: Tensor | None) -> Tensor:
    """What a probe shows of a full gradient."""
    if omega is None:
        return gradient
    return gradient @ omega if kind == "rows" else omega.t() @ gradient


def omega_of(kind: ProbeKind) -> Tensor | None:
    torch.manual_seed(8)
    return None if kind == "full" else torch.randn({"rows": N, "columns": M}[kind], 3, dtype=torch.float64)


def stacked(kind: ProbeKind, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, nn.Sequential, Tensor | None]:
    """A small network with a probed layer in its middle, its dense twin, and the directions of the probe."""
    layer, dense, *_ = layer_of("dense", None, dtype=dtype)
    first, last = nn.Linear(N, N, dtype=dtype), nn.Linear(M, 2, dtype=dtype)
    omega = omega_of(kind)
    layer.start_probe(kind, omega)
    return (
        nn.Sequential(first, nn.Tanh(), layer, last),
        nn.Sequential(copy.deepcopy(first), nn.Tanh(), dense, copy.deepcopy(last)),
        omega,
    )


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("recompute", ["no", "reentrant", "non-reentrant"])
def test_probes_add_up_the_full_gradient_over_micro_batches(kind: ProbeKind, recompute: str) -> None:
    model, twin, omega = stacked(kind)
    for micro_batch in torch.randn(3, 2, TOKENS, N, dtype=torch.float64):
        x = micro_batch.clone().requires_grad_()
        y = model(x) if recompute == "no" else checkpoint(model, x, use_reentrant=recompute == "reentrant")
        cast(Tensor, y).square().sum().backward()
        twin(micro_batch).square().sum().backward()
    with torch.no_grad():
        model(torch.randn(TOKENS, N, dtype=torch.float64))
    layer = cast(ProjectedLinear, model[2])
    full = cast(Tensor, cast(nn.Linear, twin[2]).weight.grad)
    torch.testing.assert_close(layer.end_probe(), probe_of(kind, full, omega), rtol=1e-12, atol=1e-12)
    assert layer.probe is None
    x = torch.randn(TOKENS, N, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    layer.start_probe(kind, omega)
    assert not layer.end_probe().any()


@pytest.mark.parametrize("kind", PROBES)
def test_probes_and_gradients_under_autocast_are_those_of_a_linear(kind: ProbeKind) -> None:
    """Observed in fp32, up to bf16's rounding of the products."""
    model, twin, omega = stacked(kind, torch.float32)
    x = torch.randn(64, N)
    for network in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(x).float().square().sum()
        loss.backward()
    layer, dense = cast(ProjectedLinear, model[2]), cast(nn.Linear, twin[2])
    full = cast(Tensor, dense.weight.grad)
    expected = probe_of(kind, full, None if omega is None else omega.float())
    found = layer.end_probe()
    assert found.dtype is torch.float32
    assert float((found - expected).norm() / expected.norm()) < 1e-2
    assert layer.left is not None
    projected = layer.left.float().t() @ full
    gradient = cast(Tensor, layer.compact.grad)
    assert gradient.dtype is torch.float32
    assert float((gradient - projected).norm() / projected.norm()) < 1e-2


def test_the_probe_of_a_bf16_layer_adds_up_in_fp32() -> None:
    layer, *_ = layer_of(None, "dense", dtype=torch.bfloat16)
    layer.start_probe("full")
    x = torch.randn(TOKENS, N, dtype=torch.bfloat16)
    expected = torch.zeros(M, N)
    for step in range(20):
        grad = torch.randn(TOKENS, M, generator=torch.Generator().manual_seed(step)).bfloat16()
        layer(x).backward(grad)
        expected += (grad.t() @ x).float()
    torch.testing.assert_close(layer.end_probe(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.quick("full")
@pytest.mark.parametrize("kind", PROBES)
def test_compiled_layers_are_probed_alike(kind: ProbeKind) -> None:
    torch._dynamo.reset()
    model, twin, omega = stacked(kind)
    layer, dense = cast(ProjectedLinear, model[2]), cast(nn.Linear, twin[2])
    compiled = torch.compile(model)
    x = torch.randn(TOKENS, N, dtype=torch.float64)
    for observed in (True, False, True):
        if observed:
            layer.start_probe(kind, omega)
        for network in (compiled, twin):
            network(x).square().sum().backward()
        full = cast(Tensor, dense.weight.grad)
        if observed:
            torch.testing.assert_close(layer.end_probe(), probe_of(kind, full, omega), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.compact.grad, layer.project_gradient(full), rtol=1e-10, atol=1e-10)
        model.zero_grad()
        twin.zero_grad()


def test_a_probe_follows_its_layer_to_another_device_and_dtype() -> None:
    """A probe left behind on the CPU made the first backward on a GPU fail."""
    layer, *_ = layer_of("dense", None)
    layer.start_probe("rows", torch.randn(N, 3))
    layer.to("meta")
    assert layer.probe is not None
    assert layer.omega is not None
    assert layer.probe.device == layer.omega.device == torch.device("meta")
    assert layer.probe.is_leaf
    assert layer.probe.requires_grad


def test_what_was_observed_can_be_forgotten() -> None:
    layer, dense, *_ = layer_of("dense", None)
    layer.start_probe("full")
    x = torch.randn(TOKENS, N, dtype=torch.float64)
    (layer(x) * float("nan")).sum().backward()
    layer.forget_observed()
    layer(x).sum().backward()
    dense(x).sum().backward()
    torch.testing.assert_close(layer.end_probe(), dense.weight.grad)


def test_outside_it_is_the_plain_layer() -> None:
    """``state_dict`` and strict loading speak of plain weights; loading sets the change to zero."""
    layer, dense, *_ = layer_of("dense", "dense")
    assert set(layer.state_dict()) == {"weight", "bias"}
    with torch.no_grad():
        layer.compact.fill_(1.0)
    other = nn.Linear(N, M, dtype=torch.float64)
    layer.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(layer.weight, other.weight)
    assert not layer.compact.any()
    assert not layer.weight.requires_grad
    assert "compact=(4, 4)" in repr(layer)
    names = set(vars(dense))
    layer.revert()
    assert type(layer).__name__ == "Linear"
    assert layer.weight.requires_grad
    assert set(vars(layer)) == names
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    layer(torch.randn(2, N, dtype=torch.float64)).sum().backward()
    assert layer.weight.grad is not None
