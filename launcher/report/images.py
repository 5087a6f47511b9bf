"""The charts of a report as PNGs, drawn by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from narrowgauge.engine.errors import UserError

from .curves import AXES, charts_over
from .runs import Run

_DASHES = ("solid", "dashed", "dotted", "dashdot", (0, (3, 6)))


def write_images(runs: Sequence[Run], folder: Path) -> list[Path]:
    """A PNG for each chart and axis, ``training-loss-over-steps.png``.

    Raises:
        UserError: matplotlib is not installed, or the folder cannot be written to.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--png: expected the package matplotlib, got none: pip install 'narrowgauge[plot]'") from error
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for axis, x_label in AXES.items():
            for chart in charts_over(axis, runs):
                figure = Figure(figsize=(6, 3.4), dpi=130, layout="constrained")
                FigureCanvasAgg(figure)
                axes: Any = figure.add_subplot()
                for curve in chart.curves:
                    style = _DASHES[curve.style % len(_DASHES)]
                    x, y = zip(*curve.points, strict=True)
                    axes.plot(x, y, color=f"C{curve.run}", linestyle=style, label=curve.name, linewidth=1.3)
                for x, run in chart.marks:
                    axes.axvline(x, color=f"C{run}", linestyle="dotted", linewidth=0.8)
                axes.set(title=chart.title, xlabel=x_label, ylabel=chart.unit)
                axes.grid(alpha=0.3)
                axes.legend(fontsize="small")
                path = folder / f"{chart.title.replace(' ', '-')}-over-{axis}.png"
                figure.savefig(path)
                written.append(path)
    except OSError as error:
        raise UserError(f"--png {folder}: cannot be written: {error.strerror}") from error
    return written
