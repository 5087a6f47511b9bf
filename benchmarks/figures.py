"""Draws the figures of the docs from the recorded results.

python -m benchmarks.figures            all, from benchmarks/results/ into docs/
"""

from pathlib import Path
from typing import Any

from benchmarks import network_report, offload_report, price_report, quality_curve, quality_report, quality_share
from benchmarks.results_file import read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def draw_all(folder: Path) -> dict[str, Any]:
    """Write the figures as ``NAME.png`` into a folder; returns them by name."""
    task = "LLaMA of 5.26 M parameters, 500 steps of 512 tokens, one seed"
    wide = "LLaMA of 0.92 M parameters, 400 steps of 2,048 tokens, one seed"
    long = "LLaMA of 0.46 M parameters, 1,500 steps of 512 tokens of prose, one seed"
    names = ("quality", "quality_wide", "quality_long_curve", "offload", "network", "price")
    rows = {name: read_rows(RESULTS / f"{name}.csv") for name in names}
    return {
        "quality": quality_report.plot(folder / "quality.png", rows["quality"], task=task),
        "quality_wide": quality_share.plot(folder / "quality_wide.png", rows["quality_wide"], task=wide),
        "quality_curve": quality_curve.plot(folder / "quality_curve.png", rows["quality_long_curve"], task=long),
        "offload": offload_report.plot(folder / "offload.png", rows["offload"]),
        "network": network_report.plot(folder / "network.png", rows["network"]),
        "memory": price_report.plot(folder / "memory.png", rows["price"]),
    }


if __name__ == "__main__":
    draw_all(ROOT / "docs")
