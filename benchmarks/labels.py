"""Labels of points in a plot, placed so that none covers another label, a point or an error bar."""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

# Offsets from the point in typographic points, nearest first, with the alignment of the text.
_PLACES = [
    (x * distance, y * distance, {-1: "right", 0: "center", 1: "left"}[x], {-1: "top", 0: "center", 1: "bottom"}[y])
    for distance in (6, 12, 20, 30, 42)
    for x, y in sorted(product((1, 0, -1), (0, 1, -1)), key=lambda place: abs(place[0]) + abs(place[1]))
    if (x, y) != (0, 0)
]


def place_labels(
    axes: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], styles: Sequence[dict[str, Any]]
) -> list[Any]:
    """Write ``texts[i]`` in ``styles[i]`` near ``points[i]``, where it covers nothing drawn, nor another label.

    Call it last: limits of the axes, points and lines must be final. Every marker of ``points`` and every line
    collection (error bars) and line of the axes counts as drawn.

    Returns:
        The annotations, in the order of ``texts``.

    Raises:
        ValueError: a label has no free place.
    """
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    pixels = figure.dpi / 72
    centres = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 4 * pixels, y - 4 * pixels, 8 * pixels, 8 * pixels) for x, y in centres]
    for lines in axes.collections:
        for path in lines.get_paths() if hasattr(lines, "get_segments") else ():
            taken.append(lines.get_transform().transform_path(path).get_extents().padded(2 * pixels))
    for line in axes.get_lines():
        if line.get_linestyle() != "None":
            taken += _boxes_along(line.get_transform().transform(line.get_xydata()), 3 * pixels)
    labels = []
    for point, text, style in zip(points, texts, styles, strict=True):
        for x, y, horizontal, vertical in _PLACES:
            label = axes.annotate(text, point, (x, y), textcoords="offset points", ha=horizontal, va=vertical, **style)
            box = label.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and frame.y0 <= box.y0 and box.x1 <= frame.x1 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            raise ValueError(f"{text}: expected a free place near {point}, got none; draw a larger figure")
        taken.append(box)
        labels.append(label)
    return labels


def _boxes_along(corners: Any, size: float) -> list[Any]:
    """Boxes of about ``size`` pixels that cover a line through ``corners``, also in pixels."""
    from matplotlib.transforms import Bbox

    boxes = []
    for (x, y), (next_x, next_y) in pairwise(corners):
        count = max(1, round(max(abs(next_x - x), abs(next_y - y)) / size))
        for number in range(count + 1):
            share = number / count
            boxes.append(
                Bbox.from_bounds(x + share * (next_x - x) - size / 2, y + share * (next_y - y) - size / 2, size, size)
            )
    return boxes
