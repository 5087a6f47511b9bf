"""A run as its folder tells it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowgauge.engine.config.json_file import flatten
from narrowgauge.engine.errors import UserError
from narrowgauge.engine.files import read_json
from narrowgauge.engine.report.metrics import end_records, read_metrics, start_records
from narrowgauge.engine.report.summary import SCHEMA_VERSION
from narrowgauge.engine.run_folder import CONFIG, METRICS, SUMMARY


@dataclass(frozen=True)
class Run:
    """What is shown of a run.

    Attributes:
        name: another than the other runs'.
        config: as given, flat: ``a.b`` and the value in JSON.
        resolved: what the run's ``config.json`` says besides: ``steps``, ``world_size``.
        records: of training steps, in order.
        evaluations: in order.
        starts: of each time that it was started or went on.
        ends: of each time that it was asked to end.
        summary: of a run that has finished; else None.
    """

    name: str
    folder: Path
    config: dict[str, str]
    resolved: dict[str, Any]
    records: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    ends: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def has_times(self) -> bool:
        """Whether its records say when they were written; those of version 0.1.0 do not."""
        return all(isinstance(record.get("time"), float) for record in self.records)

    def hours(self) -> dict[int, float]:
        """By step, since the run was first started; without times the sum of what its steps took."""
        if self.has_times:
            first = self.starts[0].get("time") if self.starts else None
            begin = first if isinstance(first, float) else self.records[0]["time"]
            return {record["step"]: (record["time"] - begin) / 3600 for record in self.records}
        found, total = {}, 0.0
        for record in self.records:
            seconds = record["seconds"].get("step")
            total += seconds / 3600 if isinstance(seconds, int | float) else 0.0
            found[record["step"]] = total
        return found

    def tokens(self) -> dict[int, float]:
        """By step, in millions."""
        return {record["step"]: record.get("tokens", 0) / 1e6 for record in self.records}


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs, each under a name of its own.

    Raises:
        UserError: a folder is none of a run, is broken or of another version; it names the file.
    """
    twice = {folder for folder in folders if [each.resolve() for each in folders].count(folder.resolve()) > 1}
    if twice:
        raise UserError(f"{', '.join(map(str, sorted(twice)))}: expected each run once")
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> Run:
    """
    Raises:
        UserError: see :func:`read_runs`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a run folder, got {'a file' if folder.exists() else 'nothing'} there")
    resolved = _object(folder / CONFIG)
    if not isinstance(resolved.get("config"), dict):
        raise UserError(
            f"{folder / CONFIG}: expected the configuration of a run, got none: of another version, or broken"
        )
    summary = _object(folder / SUMMARY) if (folder / SUMMARY).exists() else None
    if summary is not None and summary.get("schema_version") != SCHEMA_VERSION:
        found = summary.get("schema_version")
        raise UserError(
            f"{folder / SUMMARY}: expected schema_version {SCHEMA_VERSION}, got {found}: of another version"
        )
    for key in ("bytes", "mfu", "forecast"):
        if summary is not None and not isinstance(found := summary.get(key, {}), dict):
            raise UserError(f"{folder / SUMMARY}: {key}: expected an object, got {type(found).__name__}: broken")
    try:
        records, evaluations = read_metrics(folder)
        starts, ends = start_records(folder), end_records(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    if not records:
        raise UserError(f"{folder / METRICS}: expected records of training steps, got none")
    return Run(name, folder, flatten(resolved["config"]), resolved, records, evaluations, starts, ends, summary)


def _object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object, got {type(found).__name__}")
    return found
