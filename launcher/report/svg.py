"""Line charts as SVG without scripts; colours come from the page, which has light ones and dark ones."""

import math
from collections.abc import Sequence
from html import escape

from .curves import Chart, Curve

COLOURS = 8
_WIDTH, _HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 8, 34
_DASHES = ("", "5 3", "1.5 3", "9 3 2 3", "3 6")
# Points of a line; of more, each group's lowest and highest are drawn.
_MOST_POINTS = 600


def draw(chart: Chart, x_label: str) -> str:
    """The chart as an ``<svg>``, as wide as its place."""
    xs = [x for curve in chart.curves for x, _ in curve.points]
    ys = [y for curve in chart.curves for _, y in curve.points]
    x_ticks, y_ticks = ticks(min([0.0, *xs]), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min([0.0, *xs]), max(max(xs), 1e-12)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    label = escape(f"{chart.title} over {x_label}")
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>']
    for tick in y_ticks:
        x, y = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, y = at(tick, y_low)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 15:.1f}" text-anchor="middle">{number(tick)}</text>')
    parts.append(
        f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for x, run in chart.marks:
        place, _ = at(min(max(x, x_low), x_high), y_low)
        parts.append(
            f'<line class="mark c{run % COLOURS}" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}"'
            f' y2="{_HEIGHT - _BOTTOM}"><title>went on here</title></line>'
        )
    parts += [_line(curve, [at(x, y) for x, y in thinned(curve.points)]) for curve in chart.curves]
    return "".join([*parts, "</svg>"])


def _line(curve: Curve, places: Sequence[tuple[float, float]]) -> str:
    shape = f'class="curve c{curve.run % COLOURS}" data-curve="{escape(curve.name)}"'
    title = f"<title>{escape(curve.name)}</title>"
    if len(places) == 1:
        return f'<circle {shape} cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2.5">{title}</circle>'
    dash = _DASHES[curve.style % len(_DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline {shape}{dashes} points="{points}">{title}</polyline>'


def legend(chart: Chart) -> str:
    """A sample of each line beside its name."""
    rows = []
    for curve in chart.curves:
        dash = _DASHES[curve.style % len(_DASHES)]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        rows.append(
            f'<span><svg class="sample" viewBox="0 0 24 8" aria-hidden="true"><polyline class="curve'
            f' c{curve.run % COLOURS}"{dashes} points="0,4 24,4"/></svg>{escape(curve.name)}</span>'
        )
    return f'<div class="legend">{"".join(rows)}</div>'


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that lie around ``low`` and ``high``."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most some hundred points that keep every peak."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / (_MOST_POINTS // 2))
    found = []
    for first in range(0, len(points), size):
        group = points[first : first + size]
        found += sorted({min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])})
    return found


def number(value: float) -> str:
    """``1.5``, ``12,000``, ``3e-05``."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:,.10g}" if abs(value) < 1e7 else f"{value:.3g}"
