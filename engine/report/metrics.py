"""What a run writes while it goes, on process rank 0: ``metrics.jsonl``, and the same numbers to other sinks."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import finite, naming, parse_json, write_text
from ..run_folder import ENDS, METRICS, STARTS

if TYPE_CHECKING:
    from .sinks import Sink

logger = logging.getLogger(__name__)
# Seconds since 1970 up to the year 10000.
_LAST_TIME = 253_402_300_800


class MetricsLog:
    """One JSON object a line, and the same numbers for other sinks."""

    def __init__(self, run_dir: Path, *, first_step: int, sinks: "Sequence[Sink]" = ()) -> None:
        """Open the file; what a run that was cut short wrote beyond ``first_step`` is taken out."""
        self._path, self._sinks = run_dir / METRICS, sinks
        kept = [_line(record) for record in _records(self._path) if first_step >= record["step"]]
        write_text(self._path, "".join(kept) if first_step else "")
        self._file = self._path.open("a", buffering=1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add a record; null stands for what is not finite.

        Raises:
            OSError, UserError: naming what cannot be written.
        """
        with naming(self._path):
            self._file.write(_line({"step": step, **values}))
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        """Close the file and the sinks.

        Raises:
            OSError, UserError: naming what could not be written to its end.
        """
        with naming(self._path):
            self._file.close()
        for sink in self._sinks:
            sink.close()


def step_records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of training steps that a run has written so far, in order."""
    return read_metrics(run_dir)[0]


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of training steps and those of evaluations, in order."""
    found = _records(run_dir / METRICS)
    steps = [record for record in found if record.keys() >= {"loss", "bytes", "seconds"}]
    return steps, [record for record in found if "eval_loss" in record]


def start_records(run_dir: Path) -> list[dict[str, Any]]:
    """What is recorded of each time that the run was started or went on."""
    return _objects(run_dir / STARTS, _is_place)


def end_records(run_dir: Path) -> list[dict[str, Any]]:
    """What is recorded of each time that the run was asked to end, and did."""
    return _objects(run_dir / ENDS, _is_place)


def _records(path: Path) -> list[dict[str, Any]]:
    return _objects(path, _is_record)


def _is_record(found: dict[str, Any]) -> bool:
    numbers = (found.get(key, 0.0) for key in ("loss", "tokens", "tokens_per_second"))
    blocks = (found.get(key, {}) for key in ("bytes", "seconds"))
    step = found.get("step")
    return (
        isinstance(step, int)
        and step >= 0
        and all(isinstance(number, int | float) for number in numbers)
        and isinstance(found.get("eval_loss"), int | float | None)
        and all(isinstance(block, dict) for block in blocks)
    )


def _is_place(found: dict[str, Any]) -> bool:
    step, seconds = found.get("after_step", 0), found.get("time", 0.0)
    return isinstance(step, int) and step >= 0 and isinstance(seconds, int | float) and 0 <= seconds < _LAST_TIME


def _objects(path: Path, holds: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line; of lines that are none, as one cut short by a power cut, one warning."""
    found, odd = [], []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.is_file() else (), 1):
        try:
            value = finite(parse_json(line))
        except ValueError:
            value = None
        if isinstance(value, dict) and holds(value):
            found.append(value)
        else:
            odd.append(str(number))
    if odd:
        logger.warning(f"{path}: no record in line {', '.join(odd[:5])}{' ...' if odd[5:] else ''}; dropped")
    return found


def _line(record: dict[str, Any]) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"
