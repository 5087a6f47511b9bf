"""The table of what is told of LLaMA-7B and 13B beside published figures: the page has what the benchmark prints."""

from pathlib import Path

import pytest

from benchmarks.plan import rows


@pytest.mark.slow
def test_the_page_has_the_table_that_the_benchmark_prints() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text().splitlines()
    found = list(rows())
    assert len(found) == 8
    assert [row for row in found if row not in page] == []
    for row in found:
        name, states, _, _, peak, _, theirs = (cell.strip() for cell in row.strip("|").split("|"))
        if "(Megatron)" in theirs:
            assert float(states) == pytest.approx(float(theirs.split()[0]), abs=0.05), name
        if name.startswith("Grass"):
            assert float(peak) < 40
