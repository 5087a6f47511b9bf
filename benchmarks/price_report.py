"""What ``benchmarks.price`` measured of ways to hold fewer bytes for backward, as a plot against loss and time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.labels import place_labels
from benchmarks.results_file import Row

_NAMES = {
    "adamw": "dense AdamW",
    "recompute": "recomputed",
    "disk": "all on disk",
    "mesa8": "Mesa",
    "wta-crs-0.3": "WTA-CRS 0.3",
    "wta-crs-0.1": "WTA-CRS 0.1",
    "rad-0.5": "RAD 0.5",
    "columns-1/8": "columns 1/8",
    "columns-1/8+wta-crs-0.3": "columns, WTA-CRS",
    "columns-1/8+mesa8": "columns, Mesa",
    "columns-1/8+wta-crs-0.3+mesa8+disk": "columns, WTA-CRS,\nMesa, disk",
}


def plot(path: Path, rows: Sequence[Row]) -> Any:
    """Draw loss and a step's time against the bytes in memory, all against dense AdamW; returns the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["method"] in _NAMES]
    plain = next(row for row in rows if row["method"] == "adamw")
    figure = Figure(figsize=(12, 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    colors = ["#c44e52" if "columns" in row["method"] else "#1f4e96" for row in rows]
    panels = []
    for axes, column, zero in ((left, "loss_mean", plain["loss_mean"]), (right, "step_ratio", 0.0)):
        points = [(row["saved_ratio"], row[column] - zero) for row in rows]
        panels.append((axes, points))
        axes.scatter(*zip(*points, strict=True), c=colors, s=26, zorder=3)
        axes.axhline(plain[column] - zero, color="grey", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_xlabel("bytes in memory for backward, against dense AdamW")
        axes.set_xlim(-0.12, 1.12)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("validation loss above dense AdamW's")
    right.set_ylabel("time of a step, against dense AdamW")
    right.set_yscale("log")
    right.set_yticks([1, 1.5, 2, 3], ["1x", "1.5x", "2x", "3x"])
    right.minorticks_off()
    spread = plain["loss_high"] - plain["loss_low"]
    title = "Exact ways first: recomputation and the disk cost no loss\n"
    left.set_title(title, fontsize=11, fontweight="bold", loc="left")
    note = f"a LLaMA of 0.92 M parameters; means of three seeds, which differ by {spread:.2f}; red: columns"
    left.text(0, 1.02, note, transform=left.transAxes, fontsize=9)
    for axes, points in panels:
        styles = [{"fontsize": 8.5, "color": color} for color in colors]
        place_labels(axes, points, [_NAMES[row["method"]] for row in rows], styles)
    figure.savefig(path)
    return figure
