"""What ``benchmarks.offload`` measured, as rows of numbers and as a plot of time against memory."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.labels import place_labels
from benchmarks.offload_cases import KEEP, LAYER_INPUTS, RECOMPUTE
from benchmarks.results_file import Row

CURVE = ["keep 75 %", "keep 50 %", "keep 25 %", "offload everything"]
"""Cases that show time over memory, beside those that are always measured."""

_MIB = 1 << 20


def rows_of(found: dict[str, dict[str, Any]]) -> list[Row]:
    """A row per case: peak of saved bytes in memory, step against keeping all (median, quartiles), bytes moved."""
    return [
        {
            "case": name,
            "resident_mib": figures["memory"]["resident"] / _MIB,
            "ratio": figures["step"]["ratio"],
            "ratio_low": figures["step"]["ratio_quartiles"][0],
            "ratio_high": figures["step"]["ratio_quartiles"][1],
            "waited_percent": 100 * statistics.median(figures["memory"]["stall_share"]),
            "written_mib": figures["memory"]["written"] / _MIB,
            "read_mib": figures["memory"]["read"] / _MIB,
        }
        for name, figures in found.items()
    ]


def plot(path: Path, rows: Sequence[Row]) -> Any:
    """Draw the step's time against the saved bytes in memory, medians with quartiles; returns the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if "1/10" not in row["case"]]
    figure = Figure(figsize=(8, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curve = sorted((row for row in rows if row["case"] in (KEEP, *CURVE)), key=lambda row: row["resident_mib"])
    axes.plot([row["resident_mib"] for row in curve], [row["ratio"] for row in curve], color="#a9bfdc", linewidth=1)
    for row in rows:
        y = row["ratio"]
        spread = [[max(0.0, y - row["ratio_low"])], [max(0.0, row["ratio_high"] - y)]]
        axes.errorbar(row["resident_mib"], y, spread, fmt="o", color=_color(row["case"]), capsize=2, markersize=5)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlabel("saved bytes in memory, peak (MiB)")
    axes.set_ylabel("forward and backward, against keeping all")
    axes.set_xlim(-40, 740)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    title = "Offload frees memory without computing anything again\n"
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.text(0, 1.02, "medians and quartiles; red: layers are computed again", transform=axes.transAxes, fontsize=9)
    points = [(row["resident_mib"], row["ratio"]) for row in rows]
    names = [row["case"] for row in rows]
    place_labels(axes, points, names, [{"fontsize": 8.5, "color": _color(name)} for name in names])
    figure.savefig(path)
    return figure


def _color(case: str) -> str:
    return "#c44e52" if case in (RECOMPUTE, LAYER_INPUTS) else "#1f4e96"
