"""Results as CSV: what the benchmarks write, ``benchmarks/results/`` keeps and ``benchmarks.figures`` draws."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV with a header: numbers as floats, empty cells as None, other text as it is."""
    with path.open(newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows that all have the keys of the first; None becomes an empty cell."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
