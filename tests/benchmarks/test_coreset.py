"""The mixture of the coreset benchmark."""

from benchmarks.coreset_data import Sizes, pairs
from narrowgauge.engine.coreset.budgets import small_sources


def test_the_rare_sources_are_the_small_ones() -> None:
    sources = pairs(Sizes())
    sizes = [len(found) for found in sources.values()]
    small = {name for number, name in enumerate(sources) if number in small_sources(sizes)}
    assert small == {"aliases", "errors", "types", "statuses"}
    assert sum(len(sources[name]) for name in small) < 0.15 * sum(sizes)
