"""Stacked experts as compact units: outputs, gradients, and training against a second statement of Grass."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from narrowgauge.optimizers import FullNorm, GaLore, Grass
from narrowgauge.optimizers.layers.experts import CompactExperts
from narrowgauge.optimizers.layers.find_experts import find_experts
from tests.support.mixture import (
    CHOICES,
    EXPERTS,
    TRANSPOSED,
    TinyMixture,
    experts_module,
    is_compact,
    mixture,
    mixture_batch,
)
from tests.support.references.grass import ReferenceGrass

KINDS = ["mixtral", "gpt_oss", "llama4", "nemotron_h"]
STEPS, ACCUMULATION = 15, 2
# Rows of 64 bytes and multiples of them: BLAS adds up in another order where an expert's rows begin elsewhere.
ALIGNED_WIDTH, ALIGNED_HIDDEN = 24, 16
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "density": 0.3,
    "refresh_interval": 6,
    "weight_decay": 0.1,
    "matrix_lr_scale": 0.5,
}


def is_transposed(kind: str, name: str) -> bool:
    return kind in TRANSPOSED and name.endswith("_proj")


def experts_pair(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    dense = experts_module(kind, ALIGNED_WIDTH, ALIGNED_HIDDEN).double()
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    model = nn.ModuleDict({"experts": copy.deepcopy(dense)})
    Grass(model, target_modules=["*"], **{"density": 0.3, **options})
    return dense, model["experts"]


def inputs_of(kind: str, tokens: int = 20) -> list[Tensor]:
    """Hidden states, and choices without expert 3 and their weights."""
    x = torch.randn(tokens * (EXPERTS if kind == "llama4" else 1), ALIGNED_WIDTH, dtype=torch.float64)
    if kind == "llama4":
        x.view(EXPERTS, tokens, ALIGNED_WIDTH)[3] = 0.0
        return [x]
    others = torch.tensor([e for e in range(EXPERTS) if e != 3])
    chosen = others[torch.rand(tokens, EXPERTS - 1).argsort(1)[:, :CHOICES]]
    return [x, chosen, torch.rand(tokens, CHOICES, dtype=torch.float64)]


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_the_loop_and_gradients_are_the_dense_ones(kind: str, side: str) -> None:
    dense, compact = experts_pair(kind, side=side, selection="block" if kind == "mixtral" else "uniform")
    assert isinstance(compact, CompactExperts)
    assert isinstance(compact, type(dense))
    inputs = inputs_of(kind)
    twins = [x.clone() for x in inputs]
    for x in (inputs[0], twins[0], *inputs[2:], *twins[2:]):
        x.requires_grad_()
    y, wanted = compact(*inputs), dense(*twins)
    if kind == "llama4":
        torch.testing.assert_close(y, wanted, rtol=1e-14, atol=1e-14)
    else:
        assert torch.equal(y, wanted)
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted.backward(grad)
    for x, twin in zip(inputs, twins, strict=True):
        if x.requires_grad:
            torch.testing.assert_close(x.grad, twin.grad, rtol=1e-13, atol=1e-13)
    for name, parameter in dense.named_parameters():
        if name.endswith("_bias"):
            torch.testing.assert_close(compact.get_parameter(name).grad, parameter.grad, rtol=1e-13, atol=1e-13)
            continue
        unit = compact.stacked[name]
        assert unit.weight.grad is None
        assert parameter.grad is not None
        index = unit.selected()
        by_last = (side == "columns") != is_transposed(kind, name)
        full = parameter.grad[..., index] if by_last else parameter.grad[..., index, :]
        assert unit.compact.grad is not None
        found = unit.compact.grad.view_as(full)
        torch.testing.assert_close(found, full, rtol=1e-13, atol=1e-13)
        assert not found[3].any()
        assert found[0].any()


def train(model: TinyMixture, optimizer: Any, steps: int = STEPS) -> list[float]:
    losses = []
    for step in range(steps):
        for micro_batch in mixture_batch(step).chunk(ACCUMULATION):
            loss = model(micro_batch) / ACCUMULATION
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        model.zero_grad()
    return losses


@pytest.mark.cover(2)
@pytest.mark.parametrize("selection", ["uniform", "block"])
@pytest.mark.parametrize("decay", ["active", "all"])
@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_a_second_statement(kind: str, side: Any, decay: Any, selection: Any) -> None:
    model, twin = mixture(kind, dtype=torch.float64), mixture(kind, dtype=torch.float64)
    optimizer = Grass(model, **OPTIONS, side=side, decay=decay, selection=selection)
    assert {layer.weight_name for layer in optimizer.layers} == {n for n, _ in twin.named_parameters() if is_compact(n)}
    reference = ReferenceGrass(
        twin,
        is_matrix=is_compact,
        is_transposed=lambda name: is_transposed(kind, name),
        **OPTIONS,
        side=side,
        decay=decay,
        block=selection == "block",
    )
    losses, wanted = train(model, optimizer), train(twin, reference)
    assert optimizer.num_refreshes == 2
    assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < 1e-12
    found = model.state_dict()
    assert found.keys() == twin.state_dict().keys()
    for name, value in twin.state_dict().items():
        assert float((found[name] - value).norm() / value.norm()) < 1e-12, name


def trained_grass(kind: str = "mixtral", steps: int = 4, **options: Any) -> tuple[TinyMixture, Grass]:
    model = mixture(kind, dtype=torch.float64)
    optimizer = Grass(model, **{**OPTIONS, "refresh_interval": 3, **options})
    train(model, optimizer, steps)
    return model, optimizer


def test_to_the_outside_it_is_the_plain_module() -> None:
    """Names, ``state_dict`` and loading are the plain module's, and ``revert`` gives it back."""
    model, optimizer = trained_grass()
    state, twin = model.state_dict(), mixture(seed=1, dtype=torch.float64)
    plain = mixture(dtype=torch.float64)
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    Grass(twin, **OPTIONS)
    twin.load_state_dict(state)
    tokens = mixture_batch(0)
    for other in (plain, twin, copy.deepcopy(model)):
        torch.testing.assert_close(other(tokens), model(tokens), rtol=1e-12, atol=1e-12)
    optimizer.revert()
    experts = model.get_submodule("blocks.0.experts")
    assert type(experts) is type(plain.get_submodule("blocks.0.experts"))
    assert set(experts._parameters) == {"gate_up_proj", "down_proj"}
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-12, atol=1e-12)


def test_it_can_be_copied_and_pickled() -> None:
    """The class that is made for the experts of a family stands in no module, where pickle looked for it."""
    _, compact = experts_pair("mixtral")
    inputs = inputs_of("mixtral")
    compact(*inputs).square().sum().backward()
    pickled: Any = pickle.loads(pickle.dumps(compact))  # noqa: S301
    for copied in (copy.deepcopy(compact), pickled):
        assert type(copied) is type(compact)
        copied.zero_grad()
        copied(*inputs).square().sum().backward()
        for name, parameter in compact.named_parameters():
            own = copied.get_parameter(name)
            assert own is not parameter
            if parameter.grad is not None:
                assert own.grad is not None
                assert torch.equal(own.grad, parameter.grad), name


def test_a_state_is_resumed() -> None:
    model, optimizer = trained_grass(moments="carry")
    twin = mixture(seed=1, dtype=torch.float64)
    other = Grass(twin, **{**OPTIONS, "refresh_interval": 3, "moments": "carry"})
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(twin, other) == train(model, optimizer)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in twin.state_dict().items())


@pytest.mark.quick("Grass")
@pytest.mark.parametrize("name", ["Grass", "GaLore"])
def test_a_compiled_model_trains_alike(name: str) -> None:
    """Through two refreshes; the experts themselves, whose sizes are data, are not compiled."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"lr": 1e-2, "refresh_interval": 2, "density": 0.3}
    models = [mixture(dtype=torch.float64) for _ in range(2)]
    optimizers = [Grass(m, **options) if name == "Grass" else GaLore(m, **options) for m in models]
    calls: list[Any] = [torch.compile(models[0], backend="aot_eager"), models[1]]
    losses = [train(call, optimizer, 5) for call, optimizer in zip(calls, optimizers, strict=True)]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-12
    for key, value in models[1].state_dict().items():
        assert float((models[0].state_dict()[key] - value).norm() / value.norm()) < 1e-12, key


@pytest.mark.parametrize("moments", ["reset", "carry"])
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_all_experts_share_the_choice_that_their_gradients_give_together(side: Any, moments: Any) -> None:
    """``top`` with exact statistics: the largest norms over all experts; moments follow their entries."""
    model, twin = mixture("gpt_oss", dtype=torch.float64), mixture("gpt_oss", dtype=torch.float64)
    options: dict[str, Any] = {**OPTIONS, "refresh_interval": 2, "side": side}
    optimizer = Grass(model, **options, selection="top", statistics="exact", moments=moments)
    for step in range(2):
        for trained in (model, twin):
            trained.zero_grad()
            trained(mixture_batch(step)).backward()
        if step == 0:
            optimizer.step()
            twin.load_state_dict(model.state_dict())
    name = "blocks.1.experts.gate_up_proj"
    unit = next(layer.module for layer in optimizer.layers if layer.name == name)
    gradient = twin.get_parameter(name).grad
    assert gradient is not None
    norms = gradient.square().sum((0, 1) if unit.side == "columns" else (0, 2))
    before, old = unit.selected().clone(), optimizer.state[unit.compact]
    optimizer.step()
    first = {key: value.clone() for key, value in old.items()}
    assert torch.equal(unit.selected(), norms.topk(unit.rank).indices.sort().values)
    kept = {int(e): i for i, e in enumerate(before)}
    shape = (EXPERTS, -1, unit.rank) if unit.side == "columns" else (EXPERTS, unit.rank, gradient.shape[-1])
    moment = first["exp_avg"].view(shape)
    for position, entry in enumerate(unit.selected().tolist()):
        own = moment[..., position] if unit.side == "columns" else moment[:, position]
        assert bool(own.any()) == (moments == "carry" and entry in kept)


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_probes_see_the_full_gradient(kind: str, side: str) -> None:
    dense, compact = experts_pair(kind, side=side)
    assert isinstance(compact, CompactExperts)
    inputs, grad = inputs_of(kind), torch.randn(20, ALIGNED_WIDTH, dtype=torch.float64)
    dense(*inputs).backward(grad)
    for name, unit in compact.stacked.items():
        gradient = dense.get_parameter(name).grad
        assert gradient is not None
        m, n = unit.weight_shape
        rows, columns, own = (torch.randn(d, 4, dtype=torch.float64) for d in (n, m, m // EXPERTS))
        wanted = {
            ("rows", rows): gradient.view(m, n) @ rows,
            ("columns", columns): columns.t() @ gradient.view(m, n),
            ("columns", own): (own.t() @ gradient).view(-1, n),
            ("full", None): gradient.view(m, n),
        }
        for (kind_of, omega), expected in wanted.items():
            unit.start_probe(kind_of, omega)
            for _ in range(2):
                compact(*inputs).backward(grad / 2)
            torch.testing.assert_close(unit.end_probe(), expected, rtol=1e-12, atol=1e-12)


def test_columns_drawn_with_repeats_are_added() -> None:
    """The change is the scaled one of all experts' columns, and idle experts are only decayed."""
    model = mixture(dtype=torch.float64)
    optimizer = Grass(model, **{**OPTIONS, "weight_decay": 0.0}, selection="multinomial_replacement")
    name = "blocks.0.experts.gate_up_proj"
    unit = next(layer.module for layer in optimizer.layers if layer.name == name)
    before = unit.weight.detach().clone()
    model(mixture_batch(0)).backward()
    index = unit.selected()
    optimizer.step()
    change = unit.weight.detach() - before
    others = [column for column in range(before.shape[-1]) if column not in index]
    assert not change[..., others].any()
    assert not change[1].any()
    assert bool(change[0][:, index].all())


def test_clipping_by_the_full_norm_counts_experts() -> None:
    model, twin = mixture(dtype=torch.float64), mixture(dtype=torch.float64)
    norm = FullNorm(Grass(model, **OPTIONS), sketch_size=1000)
    for trained in (model, twin):
        trained(mixture_batch(0)).backward()
    expected = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]).norm()
    # Directions are drawn in fp32.
    torch.testing.assert_close(norm.norm(), expected, rtol=1e-7, atol=0.0, check_dtype=False)


def test_a_budget_counts_all_experts() -> None:
    model = mixture()
    optimizer = Grass(model, lr=1e-2, budget=3000)
    assert 2900 <= sum(layer.module.compact.numel() for layer in optimizer.layers) <= 3000


def test_one_parameter_can_stay_dense() -> None:
    """A target alone, or a rank that covers a dimension: the other parameter is trained whole."""
    model, twin = mixture(dtype=torch.float64), mixture(dtype=torch.float64)
    optimizer = Grass(model, lr=1e-2, density=0.3, target_modules=["*down_proj"])
    assert [layer.name for layer in optimizer.layers] == [f"blocks.{i}.experts.down_proj" for i in range(2)]
    for trained in (model, twin):
        trained(mixture_batch(0)).backward()
    for name, parameter in twin.named_parameters():
        if not name.endswith("down_proj"):
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-12, atol=1e-12)


def test_a_number_above_the_experts_is_none() -> None:
    """Where experts lie on several devices transformers gives others' tokens such a number."""
    dense, compact = experts_pair("mixtral")
    x, chosen, weights = inputs_of("mixtral")
    chosen[::2, 1] = EXPERTS
    torch.testing.assert_close(compact(x, chosen, weights), dense(x, chosen, weights), rtol=1e-13, atol=1e-13)
    chosen[:] = EXPERTS
    assert not compact(x, chosen, weights).any()


class Unusual(MixtralExperts):
    """Has all the attributes of experts that are known, and weights tokens before the activation."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return super().forward(hidden_states * top_k_weights.sum(1, keepdim=True), top_k_index, top_k_weights)


def test_experts_that_compute_something_else_stay_dense() -> None:
    model = mixture()
    experts: Any = model.get_submodule("blocks.0.experts")
    experts.__class__ = Unusual
    with pytest.warns(UserWarning, match="matrices stacked in one parameter"):
        optimizer = Grass(model, density=0.3, min_compact_share=0.0)
    assert not isinstance(experts, CompactExperts)
    assert isinstance(model.get_submodule("blocks.1.experts"), CompactExperts)
    assert {"blocks.*.experts.gate_up_proj", "blocks.*.experts.down_proj"} == set(optimizer.coverage.dense) - {
        "blocks.*.router.weight"
    }


class Counted(MixtralExperts):
    """Counts how often it is run."""

    runs = 0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        Counted.runs += 1
        return super().forward(hidden_states, top_k_index, top_k_weights)


def test_of_experts_that_are_alike_one_is_tried() -> None:
    """It took 69 ms for each layer of a model, at every start."""
    layers = nn.ModuleList(experts_module("mixtral") for _ in range(4))
    for layer in layers:
        layer.__class__, layer.config = Counted, layers[0].config
    # Of all rows together instead of each expert's.
    layers[2].act_fn = nn.Softmax(dim=0)
    Counted.runs = 0
    assert {name.partition(".")[0] for name in find_experts(layers)} == {"0", "1", "3"}
    assert Counted.runs == 2


def test_stacked_biases_are_no_matrices() -> None:
    model = mixture("gpt_oss")
    coverage = Grass(model, density=0.3).coverage
    sizes = {name: p.numel() for name, p in mixture("gpt_oss").named_parameters()}
    covered = sum(size for name, size in sizes.items() if is_compact(name))
    router = sum(size for name, size in sizes.items() if "router" in name)
    assert (coverage.covered, coverage.total) == (covered, covered + router)
    assert coverage.dense == {"blocks.*.router.weight": router}


def test_only_selected_inputs_are_kept_and_no_full_gradient_is_formed() -> None:
    """Of what a density of 1/8 stands for, nothing as large as a weight is made in backward."""
    torch.manual_seed(0)
    dense = experts_module("mixtral", 64, 32)
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    model: Any = nn.ModuleDict({"experts": dense})
    Grass(model, density=1 / 8, target_modules=["*"])
    x, chosen, weights = torch.randn(8, 64, requires_grad=True), torch.zeros(8, 2).long(), torch.rand(8, 2)
    chosen[:, 1] = 3
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not isinstance(tensor, nn.Parameter):
            saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model["experts"](x, chosen, weights)
    # 16 rows of tokens and choices: of the 64 inputs 8, and of the 32 4.
    assert saved.count((16, 8)) == 1
    assert saved.count((16, 4)) == 1
    # Apart from the outputs, which the routing weights' gradient needs.
    assert saved.count((16, 64)) <= 1
    with Largest() as largest:
        y.sum().backward()
    assert largest.numel < EXPERTS * 64 * 32


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(a is not None for r in func._schema.returns for a in [r.alias_info])
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not is_view:
                self.numel = max(self.numel, leaf.numel())
        return out
