"""Muon and NorMuon as bases: their equations in fp64, torch's Muon, stacked experts, and what is refused."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn

from narrowgauge.optimizers import CompactOptimizer, GaLore, Grass
from narrowgauge.optimizers.layers.projected_linear import ProjectedLinear
from narrowgauge.optimizers.layers.watch import unwatch
from tests.optimizers.layers.test_transposed import is_transposed, transposed
from tests.support.mixture import EXPERTS, mixture, mixture_batch
from tests.support.models import is_matrix, tiny, token_batch, train_steps
from tests.support.references.muon import ReferenceMuon, ReferenceMuonGrass

OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "matrix_lr_scale": 0.5,
    "density": 0.3,
    "refresh_interval": 4,
    "weight_decay": 0.1,
}
MUON: dict[str, Any] = {"adjust": "match_rms_adamw", "nesterov": True, "neuron_beta": None}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "muon": ({"base": "Muon"}, MUON),
    "original": ({"base": "Muon", "adjust_lr_fn": "original", "side": "rows"}, {**MUON, "adjust": "original"}),
    "plain-momentum": (
        {"base": "Muon", "nesterov": False, "momentum": 0.8},
        {**MUON, "nesterov": False, "momentum": 0.8},
    ),
    "carry": ({"base": "Muon", "moments": "carry"}, MUON),
    "carry-rows": ({"base": "Muon", "moments": "carry", "side": "rows"}, MUON),
    "normuon": ({"base": "NorMuon"}, {**MUON, "neuron_beta": 0.95}),
    "normuon-carry": ({"base": "NorMuon", "moments": "carry", "neuron_beta": 0.7}, {**MUON, "neuron_beta": 0.7}),
    "normuon-original-rows": (
        {"base": "NorMuon", "adjust_lr_fn": "original", "side": "rows"},
        {**MUON, "adjust": "original", "neuron_beta": 0.95},
    ),
}


def reference(model: nn.Module, own: dict[str, Any], muon: dict[str, Any], **more: Any) -> ReferenceMuonGrass:
    return ReferenceMuonGrass(
        model,
        muon=muon,
        carry=own.get("moments") == "carry",
        side=own.get("side", "columns"),
        **{"is_matrix": is_matrix, **OPTIONS, **more},
    )


def compare(model: nn.Module, twin: nn.Module, optimizer: CompactOptimizer, plain: Any, batch: Any) -> None:
    for step in range(11):
        for network in (model, twin):
            network(batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
        twin.zero_grad()
    wanted = twin.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.quick("carry-rows", "normuon")
@pytest.mark.parametrize(("own", "muon"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_grass_follows_the_equations_in_fp64(own: dict[str, Any], muon: dict[str, Any]) -> None:
    """Through two refreshes."""
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    optimizer = Grass(model, **{**OPTIONS, **own})
    compare(model, twin, optimizer, reference(twin, own, muon), lambda step: token_batch(step, 4))
    assert optimizer.num_refreshes == 2


@pytest.mark.slow
@pytest.mark.parametrize("base", ["Muon", "NorMuon"])
def test_transposed_weights_are_taken_as_outputs_times_inputs(base: str) -> None:
    model, twin = transposed(dtype=torch.float64), transposed(dtype=torch.float64)
    assert is_transposed(model)
    own: dict[str, Any] = {"base": base, "adjust_lr_fn": "original"}
    muon = {**MUON, "adjust": "original", "neuron_beta": 0.95 if base == "NorMuon" else None}
    plain = reference(twin, own, muon, is_transposed=lambda name: True)
    compare(model, twin, Grass(model, **{**OPTIONS, **own}), plain, lambda step: token_batch(step, 4))


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_each_stacked_expert_is_a_matrix_of_its_own(kind: str) -> None:
    """One of them without tokens in some steps: it moves by its decay alone."""
    model, twin = mixture(kind, dtype=torch.float64), mixture(kind, dtype=torch.float64)
    own: dict[str, Any] = {"base": "NorMuon"}
    optimizer = Grass(model, **{**OPTIONS, **own})
    assert {layer.module.num_matrices for layer in optimizer.layers} == {1, EXPERTS}
    names = {layer.weight_name for layer in optimizer.layers}
    experts = {layer.weight_name for layer in optimizer.layers if layer.module.num_matrices > 1}
    plain = reference(
        twin,
        own,
        {**MUON, "neuron_beta": 0.95},
        is_matrix=lambda name: name in names,
        is_transposed=lambda name: kind == "gpt_oss" and name in experts,
    )
    compare(model, twin, optimizer, plain, mixture_batch)


@pytest.mark.parametrize(
    ("moments", "base"), [("keep", "Muon"), pytest.param("reset", "NorMuon", marks=pytest.mark.slow)]
)
def test_galore_follows_the_equations_in_fp64(moments: Any, base: Any) -> None:
    """The twin's optimizer only chooses the bases."""
    options: dict[str, Any] = {**OPTIONS, "moments": moments, "projector": "svd", "matrix_lr_scale": 1.0}
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    optimizer, chooser = GaLore(model, **options, base=base), GaLore(twin, **options)
    for layer in chooser.layers:
        unwatch(layer.module)
    compact = {id(layer.module.compact) for layer in chooser.layers}
    others = [p for p in twin.parameters() if p.requires_grad and id(p) not in compact]
    adam = torch.optim.AdamW(others, lr=OPTIONS["lr"], weight_decay=0.1)
    keywords = {**MUON, "neuron_beta": 0.95 if base == "NorMuon" else None}
    muons = {layer.name: ReferenceMuon(**keywords) for layer in chooser.layers}
    for step in range(10):
        for network in (model, twin):
            network(token_batch(step, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
        adam.step()
        with torch.no_grad():
            for layer in chooser.layers:
                module = cast(ProjectedLinear, layer.module)
                assert module.compact.grad is not None
                change = module.lift(-1e-2 * muons[layer.name].change(module.compact.grad), 0, module.weight_shape[0])
                module.weight.mul_(1 - 1e-2 * 0.1).add_(change)
        chooser.num_steps += 1
        if chooser.is_refresh_due():
            chooser.refresh()
            if moments == "reset" or step == 0:
                muons = {layer.name: ReferenceMuon(**keywords) for layer in chooser.layers}
        chooser._observe_next_step()
        twin.zero_grad()
    assert optimizer.num_refreshes == 3
    wanted = twin.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_at_density_one_it_is_torchs_muon_bit_for_bit(adjust: Any) -> None:
    """Beside AdamW for embeddings, head and norms, each at its own rate."""
    model, twin = tiny(), tiny()
    with pytest.warns(UserWarning, match="plain Muon"):
        optimizer = Grass(
            model, **{**OPTIONS, "density": 1.0}, base="Muon", adjust_lr_fn=adjust, orthogonalized_in="bfloat16"
        )
    named = dict(twin.named_parameters())
    muon = torch.optim.Muon(
        [p for name, p in named.items() if is_matrix(name)], lr=5e-3, weight_decay=0.1, adjust_lr_fn=adjust
    )
    adam = torch.optim.AdamW([p for name, p in named.items() if not is_matrix(name)], lr=1e-2, weight_decay=0.1)
    losses = train_steps(model, optimizer, 0, 8)
    for step in range(8):
        twin(token_batch(step, 4)).backward()
        muon.step()
        adam.step()
        twin.zero_grad()
    assert len(set(losses)) == 8
    wanted = twin.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_a_whole_matrix_in_another_order_of_memory_is_refused() -> None:
    """It ended the first step, with the momentum already moved."""
    model = tiny()
    linear = model.get_submodule("blocks.0.up")
    linear.weight = nn.Parameter(linear.get_parameter("weight").detach().t().contiguous().t())
    with pytest.raises(
        ValueError, match=r"base: expected blocks\.0\.up\.weight to be contiguous with Muon, got strides"
    ):
        Grass(model, density=1.0, base="Muon")
    with pytest.warns(UserWarning, match="plain AdamW"):
        Grass(model, density=1.0)


@pytest.mark.parametrize("base", ["Muon", pytest.param("NorMuon", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cls", [Grass, GaLore])
def test_a_state_dict_resumes_bit_for_bit_with_half_of_adams_state(cls: Any, base: str) -> None:
    model, twin = tiny(), tiny()
    optimizer, resumed = cls(model, **OPTIONS, base=base), cls(twin, **OPTIONS, base=base)
    train_steps(model, optimizer, 0, 6)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train_steps(model, optimizer, 6, 10) == train_steps(twin, resumed, 6, 10)
    compact = [layer.module.compact for layer in optimizer.layers]
    elements = sum(p.numel() for p in compact)
    held = [v for p in compact for v in optimizer.state[p].values()]
    assert sum(v.numel() for v in held if torch.is_tensor(v)) == elements
    neurons = sum(v.numel() for of in held if isinstance(of, dict) for v in of.values())
    assert neurons == (sum(p.shape[0] for p in compact) if base == "NorMuon" else 0)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Grass, {"momentum": 0.9}, "momentum: expected None with base AdamW, which does not have it, got 0.9"),
        (Grass, {"base": "Muon", "neuron_beta": 0.9}, "neuron_beta: expected None with base Muon"),
        (GaLore, {"base": "Muon", "momentum": 1.0}, "momentum: expected a number of at least 0 and below 1"),
        (Grass, {"base": "Muon", "vocabulary": "rows"}, "vocabulary: expected 'dense' with base Muon"),
        (
            Grass,
            {"base": "Muon", "selection": "multinomial_replacement"},
            "base: expected 'AdamW' or 'AdamW8bit' with .*, got 'Muon'",
        ),
        (
            Grass,
            {"base": "NorMuon", "moments": "carry", "side": "rows"},
            "moments: expected 'reset' with base 'NorMuon' and side 'rows'",
        ),
        (
            GaLore,
            {"base": "Muon", "param_groups": [{"params": ["*.q.weight"], "betas": (0.5, 0.9)}]},
            r"param_groups: expected no \['betas'\] for the matrices with base Muon",
        ),
        (
            GaLore,
            {"base": "Muon", "projector": "svd", "reference_compatible": True},
            "base: expected 'AdamW' with reference_compatible, got 'Muon'",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    cls: type[CompactOptimizer], options: dict[str, Any], message: str
) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        cls(model, rank=4, **options)  # type: ignore[call-arg]
    assert all(p.requires_grad for p in model.parameters())
