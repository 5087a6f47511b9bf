"""The figures of the docs are drawn from the recorded results, and no label covers another."""

from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks.figures import draw_all
from benchmarks.results_file import read_rows, write_rows


def test_no_label_covers_another(tmp_path: Path) -> None:
    figures = draw_all(tmp_path)
    assert len(figures["quality_curve"].axes[0].get_lines()) == len(figures["quality_curve"].legends[0].texts) + 1
    for name, count in (("quality", 16), ("quality_wide", 14), ("offload", 9), ("network", 32), ("memory", 22)):
        labels = [text for axes in figures[name].axes for text in axes.texts if text.get_text()]
        assert len(labels) >= count
        renderer = figures[name].canvas.get_renderer()
        boxes = {text: text.get_window_extent(renderer) for text in labels}
        for one, other in combinations(labels, 2):
            assert not boxes[one].overlaps(boxes[other]), (name, one.get_text(), other.get_text())
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"case": "keep all", "ratio": 1.0, "read": None}, {"case": "half", "ratio": 1.02, "read": 336.0}]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv") == rows
