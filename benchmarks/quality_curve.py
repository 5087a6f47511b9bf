"""What a method leaves out over the steps: its loss above AdamW's, and the share of the gap that it closes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_report import FROZEN, share_of_gap
from benchmarks.quality_sweep import BASELINE
from benchmarks.results_file import Row

_COLOURS = {
    "muon": "black",
    "frugal-1/4": "#b07d2b",
    "grass-columns-1/8": "#7fa3d1",
    "grass-columns-1/8-200": "#1f4e96",
    "grass-columns-1/8-normuon-200": "#5c8f3f",
}


def plot(path: Path, rows: Sequence[Row], *, task: str) -> Any:
    """Draw loss above AdamW's, and share of the gap where the task tells one, over the steps; one line per method.

    Args:
        path: The PNG to write.
        rows: ``method``, ``step`` and ``loss``, among them AdamW and frozen matrices.
        task: What was trained, for the title.

    Returns:
        The figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = {(row["method"], row["step"]): row["loss"] for row in rows}
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    gap, share = figure.subplots(1, 2)
    for method, colour in _COLOURS.items():
        steps = sorted(step for name, step in losses if name == method)
        above = [losses[method, step] - losses[BASELINE, step] for step in steps]
        gap.plot(steps, above, color=colour, label=method)
        closed = [share_of_gap(losses[method, step], losses[BASELINE, step], losses[FROZEN, step]) for step in steps]
        told = [(step, percent) for step, percent in zip(steps, closed, strict=True) if percent is not None]
        share.plot(*zip(*told, strict=True), color=colour)
    for axes, level, label in ((gap, 0.0, "loss above AdamW's"), (share, 100.0, "share of the gap closed, %")):
        axes.axhline(level, color="grey", linewidth=0.8, linestyle="--", zorder=1)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(task, fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    return figure
