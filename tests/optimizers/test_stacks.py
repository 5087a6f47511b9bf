"""Frugal, Apollo, LAMB and LARS on stacked experts: every expert's matrix is one of its own, wherever it is cut."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowgauge.optimizers import OPTIMIZERS, Apollo, Frugal, Lamb
from tests.support.mixture import EXPERTS, HIDDEN, WIDTH, TinyMixture, is_matrix, mixture, mixture_batch
from tests.support.mixture_references import second_statement
from tests.support.partition import Partition, gather_pieces
from tests.support.ranks import RankPool

STEPS, INTERVAL, RANK = 10, 4, 3
# The matrices of gates are square.
SQUARE = WIDTH // 2
COMMON: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "matrix_lr_scale": 0.5}
FRUGAL: dict[str, Any] = {**COMMON, "density": 0.3, "refresh_interval": INTERVAL, "seed": 3}
APOLLO: dict[str, Any] = {**COMMON, "refresh_interval": INTERVAL, "betas": (0.8, 0.95), "eps": 1e-4, "rank": RANK}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{s: ("Frugal", {**FRUGAL, "selection": s}) for s in ("columns", "rows", "blockwise", "svd", "random")},
    "state-free-sgd": ("Frugal", {**FRUGAL, "selection": "svd", "state_free": "SGD", "state_free_lr_scale": 3.0}),
    "density-0": ("Frugal", {**FRUGAL, "density": 0.0, "selection": "columns"}),
    "apollo": ("Apollo", {**APOLLO, "scale": 1.5}),
    "apollo-tensor": ("Apollo", {**APOLLO, "scale": 2.0, "scale_type": "tensor"}),
    "apollo-no-limiter": ("Apollo", {**APOLLO, "norm_growth_limit": None}),
    "lamb": ("Lamb", {**COMMON, "betas": (0.8, 0.95), "eps": 1e-4}),
    "lars": ("Lars", {**COMMON, "momentum": 0.8, "trust_coefficient": 0.3}),
}


def make(case: str, model: TinyMixture) -> Any:
    kind, options = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of several process ranks
        return OPTIMIZERS[kind](model, **options)


def difference(model: TinyMixture, twin: TinyMixture) -> float:
    """The largest relative difference of a parameter."""
    wanted = dict(twin.named_parameters())
    return max(float(((p - wanted[n]).norm() / wanted[n].norm()).detach()) for n, p in model.named_parameters())


def expert_gradient(model: TinyMixture, expert: int) -> Tensor:
    gradient = model.get_parameter("blocks.0.experts.down_proj").grad
    assert gradient is not None
    return gradient[expert]


@pytest.mark.cover(1)
@pytest.mark.parametrize(("kind", "hidden"), [("mixtral", HIDDEN), ("gpt_oss", SQUARE), ("llama4", HIDDEN)])
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_a_second_statement(case: str, kind: str, hidden: int) -> None:
    """In some steps, of which one gives bases, an expert has no tokens; the others have more than the rank."""
    model, twin = (mixture(kind, dtype=torch.float64, hidden=hidden) for _ in range(2))
    optimizer, reference = make(case, model), second_statement(twin, *CASES[case])
    for step in range(STEPS):
        losses = []
        for trained in (model, twin):
            trained.zero_grad()
            loss = trained(mixture_batch(step, 64))
            loss.backward()
            losses.append(float(loss.detach()))
        assert bool(expert_gradient(model, 1).any()) == (step % 3 != 0)
        reference()
        optimizer.step()
        assert abs(losses[0] - losses[1]) < 1e-12
    assert difference(model, twin) < 1e-12
    assert optimizer.coverage.share > 0.9


def test_single_coordinates_are_those_of_each_matrix() -> None:
    """``randk`` counts positions as they are stored."""
    model, twin = mixture(dtype=torch.float64), mixture(dtype=torch.float64)
    options = {**FRUGAL, "selection": "randk"}
    optimizer, reference = Frugal(model, **options), second_statement(twin, "Frugal", options)
    for step in range(INTERVAL + 2):
        for trained, update in ((model, optimizer.step), (twin, reference)):
            trained.zero_grad()
            trained(mixture_batch(step)).backward()
            update()
    assert difference(model, twin) < 1e-12


def test_an_expert_without_tokens_has_the_state_of_a_zero_gradient() -> None:
    """Not of what it had before, nor of its neighbours in the stack: with nothing but zeros its state is zero."""
    for cls, options in ((Frugal, FRUGAL), (Apollo, APOLLO), (Lamb, COMMON)):
        model = mixture()
        before = model.get_parameter("blocks.0.experts.down_proj").detach().clone()
        optimizer: Any = cls(model, **{**options, "weight_decay": 0.0})
        for _ in range(3):
            model.zero_grad()
            model(mixture_batch(0)).backward()
            optimizer.step()
        weight = model.get_parameter("blocks.0.experts.down_proj")
        assert torch.equal(weight[1].detach(), before[1])
        assert not torch.equal(weight[0].detach(), before[0])
        pieces = {(p.name, p.key): p.tensor for p in optimizer.state_pieces(weight)}
        moments = {e: pieces.get((f"blocks.0.experts.down_proj[{e}]", "exp_avg")) for e in range(2)}
        if cls is Lamb:
            moments = dict(enumerate(optimizer.state[weight]["exp_avg"]))
        assert moments[1] is not None
        assert not moments[1].any()
        assert moments[0] is not None
        assert moments[0].any()


def against_whole(case: str, cuts: list[float]) -> dict[str, Any]:
    """Cut over the ranks, borders within experts, against the same optimizer on whole parameters."""
    model, twin = mixture(dtype=torch.float64), mixture(dtype=torch.float64)
    optimizer, whole = make(case, model), make(case, twin)
    partition = Partition(model, optimizer, cuts)
    summed, sum_ = [], partition.sum_

    def counting(tensor: Tensor) -> Tensor:
        summed.append(tensor.numel())
        return sum_(tensor)

    partition.sum_ = counting  # type: ignore[method-assign]
    for step in range(STEPS):
        for trained in (model, twin):
            trained.zero_grad()
            trained(mixture_batch(step, 32)).backward()
        partition.step()
        whole.step()
    stacks = [s for s in partition.all_shards() if s.name.endswith("_proj")]
    return {
        "difference": difference(model, twin),
        "cut": any(s.local_start % (s.shape[1] * s.shape[2]) or s.length % (s.shape[1] * s.shape[2]) for s in stacks),
        "pieces": {place: tensor.numel() for place, tensor in gather_pieces(optimizer).items()},
        "summed": sum(summed) / STEPS,
    }


@pytest.mark.parametrize(
    "case",
    [c if c in ("columns", "svd", "apollo", "lamb") else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
)
def test_experts_cut_over_two_ranks_equal_whole_ones(two_ranks: RankPool, case: str) -> None:
    check_cut(two_ranks, case, [0.37])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rows", "svd", "random", "apollo-tensor", "lars"])
def test_experts_cut_over_three_ranks_equal_whole_ones(three_ranks: RankPool, case: str) -> None:
    check_cut(three_ranks, case, [0.213, 0.641])


def check_cut(pool: RankPool, case: str, cuts: list[float]) -> None:
    results = pool.run(against_whole, case, cuts)
    assert any(result["cut"] for result in results)
    kind, _ = CASES[case]
    matrices = {name: p for name, p in mixture().named_parameters() if is_matrix(name)}
    channels = sum(max(p.shape[-2:]) * p.shape[:-2].numel() for p in matrices.values())
    for result in results:
        assert result["difference"] < 1e-11
        if kind == "Apollo":
            own = {place: size for place, size in result["pieces"].items() if place[1] == "exp_avg"}
            assert own["blocks.1.experts.gate_up_proj[4]", "exp_avg"] == RANK * max(2 * HIDDEN, WIDTH)
            assert sum(own.values()) == RANK * channels
            factors = channels if case != "apollo-tensor" else 2 * (1 + 2 * EXPERTS)
            assert result["summed"] == RANK * channels + 2 * factors
        if case == "columns":
            # Of each expert's columns, 0.3 of them, rounded.
            assert result["pieces"]["blocks.1.experts.gate_up_proj[4]", "exp_avg"] == 2 * HIDDEN * 5
            assert result["pieces"]["blocks.1.experts.down_proj[0]", "exp_avg"] == WIDTH * 3
            assert result["summed"] == 0


def test_a_state_goes_on() -> None:
    """In plain PyTorch, saved between two refreshes."""
    for case in ("svd", "apollo", "lamb"):
        model = mixture("gpt_oss")
        optimizer = make(case, model)
        for step in range(INTERVAL + 1):
            update(model, optimizer, step)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        losses = [update(model, optimizer, step) for step in range(INTERVAL + 1, STEPS)]
        other = mixture("gpt_oss", seed=1)
        resumed = make(case, other)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        assert [update(other, resumed, step) for step in range(INTERVAL + 1, STEPS)] == losses


def update(model: TinyMixture, optimizer: Any, step: int) -> float:
    loss = model(mixture_batch(step))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def test_what_is_no_matrix_of_its_own_is_told() -> None:
    model = mixture()
    with pytest.raises(
        ValueError, match=r"rank: 12 is above the shorter side 11 of 'blocks\.0\.experts\.down_proj\[0\]"
    ):
        Apollo(model, rank=12)
    with pytest.raises(ValueError, match=r"reference_compatible: expected matrices .* experts stacked in blocks\.0\."):
        Apollo(model, rank=2, reference_compatible=True)
    assert Apollo(model, rank=2, reference_compatible=True, target_modules=["*.mix"]).targets == [
        "blocks.0.mix.weight",
        "blocks.1.mix.weight",
    ]
    only = Frugal(model, target_modules=["*.down_proj"])
    assert [name for name, rule in only.subspaces.rules.items() if rule == "projected"] == [
        f"blocks.{block}.experts.down_proj[{expert}]" for block in range(2) for expert in range(EXPERTS)
    ]


def test_biases_of_experts_are_biases() -> None:
    """They are stacked in two dimensions, as a matrix is."""
    model = mixture("gpt_oss")
    assert "blocks.0.experts.down_proj_bias" in Lamb(model).excluded
    rules = Frugal(model, norms="free").subspaces.rules
    assert rules["blocks.0.experts.down_proj_bias"] == "free"
    assert rules["blocks.0.experts.down_proj[2]"] == "projected"
    assert rules["blocks.0.router.weight"] == "full"
