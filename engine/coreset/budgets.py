"""How many examples of a batch each source contributes."""

from collections.abc import Collection, Mapping, Sequence


def small_sources(sizes: Sequence[int]) -> set[int]:
    """The sources with fewer samples than the mean: of MathInstruct's 14 the ten that CoLM's authors list by hand."""
    mean = sum(sizes) / len(sizes)
    return {number for number, size in enumerate(sizes) if size < mean}


def budgets(counts: Mapping[int, int], whole: Collection[int], budget: int) -> dict[int, int]:
    """Of each source in a batch, how many examples are kept; in all ``budget``, never more than there are.

    Sources of ``whole`` keep all they have, where that fits; the others share the rest in proportion to their counts,
    by the largest remainders. Where it does not fit, all sources share alike.

    Args:
        counts: examples of the batch by source.
        budget: at most the sum of the counts.
    """
    kept = {source: counts[source] for source in counts if source in whole}
    if sum(kept.values()) > budget:
        kept = {}
    others = {source: count for source, count in sorted(counts.items()) if source not in kept}
    rest, total = budget - sum(kept.values()), sum(others.values())
    if total == 0:
        return kept
    exact = {source: rest * count / total for source, count in others.items()}
    shares = {source: int(share) for source, share in exact.items()}
    by_remainder = sorted(others, key=lambda source: (shares[source] - exact[source], source))
    for source in by_remainder[: rest - sum(shares.values())]:
        shares[source] += 1
    return kept | shares
