"""What a run writes while it goes: ``metrics.jsonl`` and TensorBoard, on process rank 0."""

import json
from pathlib import Path
from typing import Any

from ..files import write_text
from ..run_folder import METRICS, TENSORBOARD


class MetricsLog:
    """One JSON object a line, and the same numbers as TensorBoard scalars."""

    def __init__(self, run_dir: Path, *, first_step: int, tensorboard: bool) -> None:
        """Open the files; what a run that was cut short wrote beyond ``first_step`` is taken out."""
        path = run_dir / METRICS
        kept = [line for line in _lines(path) if first_step and _step_of(line) <= first_step]
        write_text(path, "".join(kept))
        self._file = path.open("a", buffering=1)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in _flat(values):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def step_records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of training steps that a run has written so far, in order."""
    records = (json.loads(line) for line in _lines(run_dir / METRICS))
    return [record for record in records if record.keys() >= {"loss", "bytes", "seconds"}]


def _lines(path: Path) -> list[str]:
    return [line + "\n" for line in path.read_text(errors="replace").splitlines()] if path.is_file() else []


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _flat(values: dict[str, Any], path: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in values.items():
        name = f"{path}/{key}" if path else key
        if isinstance(value, dict):
            found += _flat(value, name)
        elif isinstance(value, int | float):
            found.append((name, float(value)))
    return found
