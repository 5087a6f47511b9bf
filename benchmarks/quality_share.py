"""The share of the gap closed against what it takes: bytes sent, and the optimizer's memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.labels import place_labels
from benchmarks.quality_report import FROZEN
from benchmarks.results_file import Row

_COLOURS = {"adamw": "black", "grass": "#1f4e96", "galore": "#1f4e96"}
_AXES = {"sent_mib": "sent per step, MiB", "optimizer_mib": "optimizer state, MiB"}


def plot(path: Path, rows: Sequence[Row], *, task: str) -> Any:
    """Draw the share of the gap, one point per method, once for each of the two.

    Args:
        path: The PNG to write.
        rows: ``method``, ``share_percent``, ``sent_mib``, ``optimizer_mib`` and, ``yes`` or ``no``, ``at_edge``: the
            best rate is at the end of those tried, and the point is drawn hollow. ``share_low`` and ``share_high``,
            where there are some, are those of the seeds. Frozen matrices, 0 by definition, are left out.
        task: What was trained, for the title.

    Returns:
        The figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    rows = [row for row in rows if row["method"] != FROZEN]
    names = [row["method"] for row in rows]
    colours = [_COLOURS.get(name.split("-")[0], "#b07d2b") for name in names]
    for axes, (key, label) in zip(panels, _AXES.items(), strict=True):
        points = [(row[key], row["share_percent"]) for row in rows]
        for row, (x, y), colour in zip(rows, points, colours, strict=True):
            axes.plot(x, y, "o", color=colour, markerfacecolor="white" if row["at_edge"] == "yes" else colour, zorder=3)
            if row.get("share_low") is not None:
                axes.vlines(x, row["share_low"], row["share_high"], color=colour, linewidth=1.0, zorder=2)
        axes.margins(x=0.15, y=0.12)
        axes.axhline(100.0, color="grey", linewidth=0.8, linestyle="--", zorder=1)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of the way from frozen matrices to AdamW, %")
    figure.suptitle(f"{task}; hollow: another rate may do better", fontsize=10, x=0.01, ha="left")
    for axes, key in zip(panels, _AXES, strict=True):
        styles = [{"fontsize": 8, "color": colour} for colour in colours]
        place_labels(axes, [(row[key], row["share_percent"]) for row in rows], names, styles)
    figure.savefig(path)
    return figure
