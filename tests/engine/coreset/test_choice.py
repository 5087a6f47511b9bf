"""Which examples of a batch are chosen, against statements of the rule that try everything."""

from itertools import combinations

import pytest
import torch

from narrowgauge.engine.coreset.budgets import budgets, small_sources
from narrowgauge.engine.coreset.facility import choose
from narrowgauge.engine.coreset.vectors import Vectors, distances, draw_directions


def value(points: torch.Tensor, chosen: list[int]) -> float:
    """Facility location, stated by loops."""
    apart = [[float((a - b).abs().sum()) for b in points.double()] for a in points.double()]
    largest = max(max(row) for row in apart)
    return sum(max(largest - apart[i][j] for j in chosen) for i in range(len(points)))


@pytest.mark.parametrize("seed", range(12))
def test_lazy_greedy_takes_the_best_next_example_each_time(seed: int) -> None:
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(seed))
    chosen = choose(distances(points), 4)
    for number in range(4):
        gains = [value(points, [*chosen[:number], j]) if j not in chosen[:number] else -1.0 for j in range(9)]
        assert gains[chosen[number]] == pytest.approx(max(gains), rel=1e-12)
    best = max(value(points, list(c)) for c in combinations(range(9), 4))
    assert value(points, chosen) >= (1 - 1 / 2.718281828) * best


def test_examples_that_are_alike_are_chosen_once() -> None:
    points = torch.tensor([[0.0], [0.0], [10.0], [10.0], [20.0]])
    assert sorted(choose(distances(points), 3)) == [0, 2, 4]
    assert sorted(choose(distances(points), 5)) == [0, 1, 2, 3, 4]


def test_budgets_keep_small_sources_and_exceed_none() -> None:
    assert budgets({0: 100, 1: 20, 2: 8}, {2}, 64) == {2: 8, 0: 47, 1: 9}
    assert budgets({0: 60, 1: 1, 2: 3}, set(), 32) == {0: 30, 1: 1, 2: 1}
    # The small ones alone are too many.
    assert budgets({0: 10, 1: 40, 2: 14}, {1}, 32) == {0: 5, 1: 20, 2: 7}
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        counts = {s: int(c) for s, c in enumerate(torch.randint(1, 20, (4,), generator=generator))}
        total = sum(counts.values())
        budget = int(torch.randint(1, total + 1, (1,), generator=generator))
        found = budgets(counts, {1, 3}, budget)
        assert sum(found.values()) == budget
        assert all(0 <= found.get(source, 0) <= count for source, count in counts.items())


def test_small_sources_are_those_that_the_authors_list() -> None:
    """MathInstruct, in thousands; in their order of CoT and PoT."""
    sizes = [90, 50, 32, 7.5, 2, 7, 0.3, 0.6, 14, 24, 7, 11, 14, 0.7]
    assert small_sources([int(1000 * size) for size in sizes]) == {3, 4, 5, 6, 7, 8, 10, 11, 12, 13}


def test_places_are_adams_steps_with_each_examples_gradient_alone() -> None:
    """Over three choices, in fp64 and by loops; the coordinates are those with the largest mean."""
    elements, betas = 30, (0.8, 0.95)
    vectors = Vectors(torch.zeros(elements, dtype=torch.float64), torch.zeros(elements, dtype=torch.float64), betas)
    first, second = [0.0] * elements, [0.0] * elements
    for step in range(1, 4):
        z = draw_directions([step, step + 100], elements, torch.device("cpu")).double()
        c = torch.randn(6, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        gradients = [[sum(float(c[i, d] * z[d, k]) for d in range(2)) / 2 for k in range(elements)] for i in range(6)]

        def place(i: int, k: int) -> float:
            m = (betas[0] * first[k] + (1 - betas[0]) * gradients[i][k]) / (1 - betas[0] ** step)  # noqa: B023
            v = (betas[1] * second[k] + (1 - betas[1]) * gradients[i][k] ** 2) / (1 - betas[1] ** step)  # noqa: B023
            return m / (v**0.5 + 1e-8)

        whole = [[place(i, k) for k in range(elements)] for i in range(6)]
        means = [abs(sum(row[k] for row in whole)) for k in range(elements)]
        kept = sorted(sorted(range(elements), key=lambda k: -means[k])[:7])
        expected = torch.tensor([[row[k] for k in kept] for row in whole], dtype=torch.float64)
        assert torch.allclose(vectors.places(c, z, 7), expected, rtol=0, atol=1e-12)
        chosen = [0, 2, 5]
        first = [betas[0] * m + (1 - betas[0]) * sum(gradients[i][k] for i in chosen) / 3 for k, m in enumerate(first)]
        second = [
            betas[1] * v + (1 - betas[1]) * sum(gradients[i][k] ** 2 for i in chosen) / 3 for k, v in enumerate(second)
        ]
        vectors.update(c[chosen], z)
        assert torch.allclose(vectors.first, torch.tensor(first, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.allclose(vectors.second, torch.tensor(second, dtype=torch.float64), rtol=0, atol=1e-12)
