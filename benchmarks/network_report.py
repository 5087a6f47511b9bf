"""What ``benchmarks.network`` measured: a table and a plot, beside what the bytes and the rate predict."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare import quartiles
from benchmarks.results_file import Row

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_COLORS = ["#777777", "#1f4e96", "#6f9bd1", "#c3d6ee"]
_BASELINE = "dense AdamW, ZeRO-2"


def bits_per_second(rate: str) -> float:
    """A rate in tc's syntax, such as ``100mbit``."""
    match = re.fullmatch(r"([0-9.]+)(kbit|mbit|gbit)", rate)
    if match is None:
        raise ValueError(f"expected a rate such as 100mbit or 10gbit, got {rate!r}")
    return float(match[1]) * _UNITS[match[2]]


def predict(result: dict[str, Any], unlimited: str) -> list[Row]:
    """A row for each method and rate of one number of hosts: medians over the rounds, bytes in MB per host and step.

    The step is predicted as the same run's median without a limit, which has all the computing and copying in it,
    plus the bytes that the collectives amount to over the rate.
    """
    rows = []
    for rate, methods in result["rates"].items():
        base = methods[_BASELINE]["seconds"]
        for name, own in methods.items():
            free = statistics.median(result["rates"][unlimited][name]["seconds"])
            counted, sent = statistics.median(own["counted"]), statistics.median(own["sent"])
            seconds = statistics.median(own["seconds"])
            predicted = free + (8 * counted / bits_per_second(rate) if rate != unlimited else 0.0)
            low, ratio, high = quartiles([a / b for a, b in zip(own["seconds"], base, strict=True)])
            rows.append(
                {
                    "hosts": result["hosts"],
                    "rate": rate,
                    "method": name,
                    "sent_mb": sent / 1e6,
                    "above_sizes_percent": 100 * (sent / counted - 1),
                    "seconds": seconds,
                    "predicted_seconds": predicted,
                    "ratio": ratio,
                    "ratio_low": low,
                    "ratio_high": high,
                }
            )
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print all rows."""
    table = Table()
    for title in ("hosts", "rate", "method"):
        table.add_column(title)
    for title in ("sent per host", "against sizes", "step", "against predicted", "against dense ZeRO-2"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            str(row["hosts"]),
            row["rate"],
            row["method"],
            f"{row['sent_mb']:.1f} MB",
            f"{row['above_sizes_percent']:+.1f}%",
            f"{row['seconds']:.2f} s",
            f"{row['seconds'] / row['predicted_seconds'] - 1:+.1%}",
            f"{row['ratio']:.3f}x ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})",
        )
    Console(width=140).print(table)


def plot(path: Path, rows: Sequence[Row]) -> Any:
    """Draw the step's seconds by rate as bars, one panel per number of hosts, with a mark where it was predicted.

    Returns:
        The figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = sorted({row["hosts"] for row in rows})
    rates = sorted({row["rate"] for row in rows}, key=lambda rate: bits_per_second(rate) if rate[0].isdigit() else 1e99)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(5.5 * len(counts), 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    width = 0.84 / len(methods)
    for axes, hosts in zip(panels, counts, strict=True):
        for number, method in enumerate(methods):
            own = [row for row in rows if (row["hosts"], row["method"]) == (hosts, method)]
            places = [rates.index(row["rate"]) + (number - (len(methods) - 1) / 2) * width for row in own]
            axes.bar(places, [row["seconds"] for row in own], 0.92 * width, label=method, color=_COLORS[number % 4])
            limited = [(place, row) for place, row in zip(places, own, strict=True) if row["rate"][0].isdigit()]
            axes.plot(
                [place for place, _ in limited],
                [row["predicted_seconds"] for _, row in limited],
                "k_",
                markersize=10,
                markeredgewidth=1.5,
                label="predicted: compute + bytes / rate" if method == methods[-1] else None,
            )
            for place, row in zip(places, own, strict=True):
                top = max(row["seconds"], row["predicted_seconds"])
                axes.annotate(
                    f"{row['seconds']:.1f}",
                    (place, top),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color="#333333",
                )
        axes.set_xticks(range(len(rates)), [_spelled(rate) for rate in rates])
        axes.set_xlabel("limit of each host's link")
        axes.set_title(f"{hosts:.0f} hosts", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds per step")
    panels[-1].legend(fontsize=8, frameon=False)
    figure.suptitle("The slower the network, the more compact gradients save", fontsize=11, fontweight="bold")
    figure.savefig(path)
    return figure


def _spelled(rate: str) -> str:
    return rate.replace("kbit", " kbit/s").replace("mbit", " Mbit/s").replace("gbit", " Gbit/s")
