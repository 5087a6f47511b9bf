"""The selection rules: what they choose, how often, and that norms, seed, refresh and name alone decide."""

import pytest
import torch
from torch import Tensor

from narrowgauge.optimizers.numerics.seeds import derive_seed
from narrowgauge.optimizers.numerics.selection import SELECTION_RULES, replacement_scales, select_index

NORMS = torch.tensor([0.5, 3.0, 0.0, 1.0, 2.0, 1.5, 0.25, 0.75], dtype=torch.float64)
DRAWS = 20_000


def draw(rule: str, refresh: int, *, rank: int = 3, norms: Tensor | None = NORMS, **parts: object) -> Tensor:
    options = {"seed": 0, "name": "a", **parts}
    return select_index(SELECTION_RULES[rule], NORMS.numel(), rank, refresh=refresh, norms=norms, **options)  # type: ignore[arg-type]


def test_top_takes_the_largest_and_the_first_of_equal_ones() -> None:
    assert draw("top", 1).tolist() == [1, 4, 5]
    assert draw("top", 1, norms=torch.zeros(8, dtype=torch.float64)).tolist() == [0, 1, 2]
    assert draw("top", 1, norms=torch.ones(8, dtype=torch.float64)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_a_choice_depends_on_seed_refresh_name_and_norms_alone(rule: str) -> None:
    torch.manual_seed(1)
    first = draw(rule, 4)
    torch.manual_seed(2)
    assert torch.equal(first, draw(rule, 4))
    assert torch.equal(first, draw(rule, 4, norms=NORMS * 1e-30))
    if rule not in ("top", "block"):
        others = [draw(rule, 5), draw(rule, 4, seed=1), draw(rule, 4, name="b")]
        assert not all(torch.equal(first, other) for other in others)
    assert torch.equal(first, first.sort().values)


@pytest.mark.parametrize("rule", ["top", "multinomial"])
def test_the_first_subspace_is_the_uniform_one(rule: str) -> None:
    assert torch.equal(draw(rule, 0, norms=None), draw("uniform", 0, norms=None))


def without_replacement(weights: list[float], rank: int) -> list[float]:
    """The probability of each entry to be among ``rank`` successive draws, by enumerating them."""
    found = [0.0] * len(weights)

    def go(taken: tuple[int, ...], probability: float) -> None:
        if len(taken) == rank:
            for entry in taken:
                found[entry] += probability
            return
        left = sum(w for i, w in enumerate(weights) if i not in taken)
        for i, w in enumerate(weights):
            if i not in taken and w > 0.0:
                go((*taken, i), probability * w / left)

    go((), 1.0)
    return found


def test_multinomial_draws_one_after_the_other_without_replacement() -> None:
    """Inclusion frequencies against the exact ones, within five standard deviations; never a repeat, never norm 0."""
    counts = torch.zeros(8, dtype=torch.float64)
    for refresh in range(DRAWS):
        index = draw("multinomial", refresh)
        assert index.unique().numel() == 3
        counts[index] += 1
    expected = torch.tensor(without_replacement(NORMS.tolist(), 3), dtype=torch.float64)
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert counts[2] == 0
    assert float(((counts / DRAWS - expected).abs() / deviation.clamp_min(1e-9)).max()) < 5.0
    # The probabilities of the squared norms would be told apart.
    squared = torch.tensor(without_replacement(NORMS.square().tolist(), 3), dtype=torch.float64)
    assert float(((squared - expected).abs() / deviation.clamp_min(1e-9)).max()) > 20.0


def test_multinomial_fills_up_with_zero_norms_only_when_it_must() -> None:
    norms = torch.tensor([0.0, 1e-200, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = [draw("multinomial", refresh, norms=norms).tolist() for refresh in range(200)]
    assert all({1, 3} <= set(index) for index in found)
    assert len({tuple(index) for index in found}) == 6


def test_replacement_is_unbiased() -> None:
    """``E[P P^T] = I``: each diagonal entry within five standard deviations of 1, at several ranks."""
    norms = NORMS + 0.1
    q = norms / norms.sum()
    for rank in (1, 3, 12):
        total = torch.zeros(8, dtype=torch.float64)
        repeated = 0
        for refresh in range(DRAWS // 4):
            index = draw("multinomial_replacement", refresh, rank=rank, norms=norms)
            scales = replacement_scales(norms, index)
            torch.testing.assert_close(scales, (rank * q[index]) ** -0.5)
            total.index_add_(0, index, scales.square())
            repeated += index.unique().numel() < rank
        # A count of n draws with probability q has the variance n q (1 - q).
        deviation = ((1 - q) / q / (rank * (DRAWS // 4))).sqrt()
        assert float(((total / (DRAWS // 4) - 1).abs() / deviation).max()) < 5.0
        assert (repeated > 0) == (rank > 1)


def test_replacement_without_a_gradient_is_uniform() -> None:
    norms = torch.zeros(8, dtype=torch.float64)
    index = draw("multinomial_replacement", 3, norms=norms)
    torch.testing.assert_close(replacement_scales(norms, index), torch.full((3,), (8 / 3) ** 0.5, dtype=torch.float64))


def test_the_norm_gives_less_variance_than_its_square_or_uniform() -> None:
    """Why ``q`` is proportional to the norm: the expected square of ``P P^T G`` is smallest there."""

    def second_moment(q: Tensor) -> float:
        return float((NORMS[NORMS > 0].square() / q[NORMS > 0]).sum())

    by_norm, by_square = second_moment(NORMS / NORMS.sum()), second_moment(NORMS.square() / NORMS.square().sum())
    assert by_norm == pytest.approx(float(NORMS.sum()) ** 2)
    assert by_norm < by_square
    assert by_norm < second_moment(torch.full_like(NORMS, 1 / 8))


def test_seeds_differ_by_every_part() -> None:
    assert len({derive_seed(*parts) for parts in ((0, 1, "a"), (0, 1, "b"), (0, 2, "a"), (1, 1, "a"))}) == 4


@pytest.mark.parametrize("rule", [name for name, rule in SELECTION_RULES.items() if not rule.repeats])
def test_strata_take_as_many_from_each_block(rule: str) -> None:
    for refresh in range(5):
        index = draw(rule, refresh, rank=4, strata=2)
        assert torch.bincount(index // 4, minlength=2).tolist() == [2, 2]
        assert index.unique().numel() == 4
        assert torch.equal(index, index.sort().values)
        assert rule != "top" or index.tolist() == [1, 3, 4, 5]
