"""What ``benchmarks.network`` measured: a table and a plot, beside what the bytes and the rate predict."""

import re
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare import quartiles

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_BASELINE = "dense AdamW, ZeRO-2"


def bits_per_second(rate: str) -> float:
    """A rate in tc's syntax, such as ``100mbit``."""
    match = re.fullmatch(r"([0-9.]+)(kbit|mbit|gbit)", rate)
    if match is None:
        raise ValueError(f"{rate!r} found, a rate such as 100mbit or 10gbit is needed")
    return float(match[1]) * _UNITS[match[2]]


def predict(result: dict[str, Any], unlimited: str) -> list[dict[str, Any]]:
    """A row for each method and rate of one number of hosts.

    The step is predicted as the same run's median without a limit, which has all the computing and copying in it,
    plus the bytes that the collectives amount to over the rate.
    """
    rows = []
    for rate, methods in result["rates"].items():
        base = methods[_BASELINE]["seconds"]
        for name, own in methods.items():
            free = statistics.median(result["rates"][unlimited][name]["seconds"])
            counted = statistics.median(own["counted"])
            seconds = statistics.median(own["seconds"])
            predicted = free + (8 * counted / bits_per_second(rate) if rate != unlimited else 0.0)
            low, ratio, high = quartiles([a / b for a, b in zip(own["seconds"], base, strict=True)])
            rows.append(
                {
                    "hosts": result["hosts"],
                    "parameters": result["facts"]["parameters"],
                    "rate": rate,
                    "method": name,
                    "seconds": seconds,
                    "ratio": ratio,
                    "ratio_quartiles": [low, high],
                    "predicted": predicted,
                    "sent": statistics.median(own["sent"]),
                    "counted": counted,
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print all rows."""
    table = Table()
    for title in ("hosts", "rate", "method"):
        table.add_column(title)
    for title in ("sent per host", "against sizes", "step", "against predicted", "against dense ZeRO-2"):
        table.add_column(title, justify="right")
    for row in rows:
        low, high = row["ratio_quartiles"]
        table.add_row(
            str(row["hosts"]),
            row["rate"],
            row["method"],
            f"{row['sent'] / 1e6:.1f} MB",
            f"{row['sent'] / row['counted'] - 1:+.1%}",
            f"{row['seconds']:.2f} s",
            f"{row['seconds'] / row['predicted'] - 1:+.1%}",
            f"{row['ratio']:.3f}x ({low:.3f}-{high:.3f})",
        )
    Console(width=140).print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the step's seconds by rate, one panel per number of hosts; a mark where it was predicted."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    counts = sorted({row["hosts"] for row in rows})
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = pyplot.subplots(1, len(counts), figsize=(5.5 * len(counts), 3.8), squeeze=False, sharey=True)
    width = 0.8 / len(methods)
    for axis, hosts in zip(axes[0], counts, strict=True):
        for number, method in enumerate(methods):
            own = [
                row
                for rate in rates
                for row in rows
                if (row["hosts"], row["rate"], row["method"]) == (hosts, rate, method)
            ]
            places = [rates.index(row["rate"]) + (number - (len(methods) - 1) / 2) * width for row in own]
            axis.bar(places, [row["seconds"] for row in own], width, label=method)
            axis.plot(places, [row["predicted"] for row in own], "k_", markersize=9)
        axis.set_xticks(range(len(rates)), rates)
        axis.set_yscale("log")
        axis.set_title(f"{hosts} hosts")
    axes[0][0].set_ylabel("seconds per step")
    axes[0][0].plot([], [], "k_", label="compute + bytes / rate")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
