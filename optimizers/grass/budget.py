"""Ranks from a number of elements instead of from a share of each layer."""

from collections.abc import Mapping


def ranks_within(dims: Mapping[str, tuple[int, int]], budget: int) -> dict[str, int]:
    """Ranks of at least 1 and one density for all, so that the elements they select come close to ``budget``.

    The density is found by bisection, ranks are its share of the dimension rounded down, and what that leaves goes, one
    column or row each, to the units with the largest remainders for which it suffices.

    Args:
        dims: by unit (a layer, or layers of one index), the dimension that is selected from and how many elements one
            of its columns or rows has.

    Raises:
        ValueError: it does not cover one column or row of each.
    """
    least = sum(elements for _, elements in dims.values())
    if budget < least:
        raise ValueError(f"budget: expected at least {least}, one column or row of each layer, got {budget}")

    def share(dim: int, density: float) -> float:
        return min(float(dim), max(1.0, density * dim))

    low, high = 0.0, 1.0
    if sum(dim * elements for dim, elements in dims.values()) <= budget:
        low = 1.0
    for _ in range(60):
        density = (low + high) / 2
        fits = sum(share(dim, density) * elements for dim, elements in dims.values()) <= budget
        low, high = (density, high) if fits else (low, density)
    ranks = {name: int(share(dim, low)) for name, (dim, _) in dims.items()}
    left = budget - sum(ranks[name] * elements for name, (_, elements) in dims.items())
    for name in sorted(dims, key=lambda name: ranks[name] - share(dims[name][0], low)):
        dim, elements = dims[name]
        if ranks[name] < dim and elements <= left:
            ranks[name] += 1
            left -= elements
    return ranks
