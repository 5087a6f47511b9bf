"""Records from JSON, JSON Lines, Parquet and folders that ``datasets`` has saved: one at a time, each with its place.

Memory holds a block of a file, whatever its size. JSON is read by Python's own parser: pyarrow's takes strings that
look like dates for dates, and says in which of its blocks, not in which line, one is broken.
"""

import io
import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import DataError, one_line

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_LINES, _JSON, _PARQUET = (".jsonl", ".ndjson"), (".json",), (".parquet",)
_SAVED = ("dataset_info.json", "dataset_dict.json")
_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 1024
_ESCAPE_CHARS = 16


class Record(NamedTuple):
    """One record.

    Attributes:
        path: of the file or folder.
        unit: what is counted there, ``line`` or ``row``.
        number: from 1 on.
    """

    path: Path
    unit: str
    number: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.path}: {self.unit} {self.number}"


def is_saved_dataset(path: Path) -> bool:
    """Whether ``datasets`` has written the folder with ``save_to_disk``."""
    return path.is_dir() and any((path / name).is_file() for name in _SAVED)


def holds_records(path: Path) -> bool:
    """Whether there is a reader for what a path names, by its name, or by what lies in the folder."""
    return _kind_of(path) in _LINES + _JSON + _PARQUET or is_saved_dataset(path)


def files_below(path: Path) -> list[Path]:
    """The files that make up a source, in a fixed order."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def read_records(paths: Iterable[Path]) -> Iterator[Record]:
    """All records of files and folders, in order.

    Raises:
        DataError: naming the file and, where something is broken within it, the line or row; or the package that
            reads such files and is not installed.
    """
    for path in paths:
        if path.is_dir():
            yield from _read_dataset(path)
        elif _kind_of(path) in _PARQUET:
            yield from _read_parquet(path)
        elif _kind_of(path) in _LINES:
            yield from _read_lines(path)
        else:
            yield from _read_json(path)


def _kind_of(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    return name.suffix.lower()


def _read_lines(path: Path) -> Iterator[Record]:
    number = 0
    with _open(path) as file:
        while raw := _next(file.readline, f"{path}: after line {number}"):
            number += 1
            if raw.strip():
                yield _record(path, "line", number, _parsed(raw, f"{path}: line {number}"))


def _parsed(raw: bytes, place: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}, column {error.colno}: expected a JSON object, got a broken one: {error.msg}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}: it is nested too deeply") from error


def _read_json(path: Path) -> Iterator[Record]:
    """A list of objects, or objects one after the other, over any lines."""
    with _open(path) as file:
        text = _Text(path, file)
        in_list = text.skip() == "["
        if in_list:
            text.take()
        while (char := text.skip()) and not (in_list and char == "]"):
            number = text.line
            yield _record(path, "line", number, text.value())
            if in_list and text.skip() == ",":
                text.take()
                if text.skip() == "]":
                    raise DataError(f"{path}: line {text.line}: expected an object after ',', got ']'")
            elif in_list and text.skip() != "]":
                raise DataError(f"{path}: line {text.line}: expected ',' or ']' after an object, got {text.skip()!r}")
        if in_list:
            text.take()
            if rest := text.skip():
                raise DataError(f"{path}: line {text.line}: expected the end after the list, got {rest!r}")


class _Text:
    """A file's text from a place on, read in blocks."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, io.TextIOWrapper(file, encoding="utf-8-sig")
        self._decoder, self._rest = json.JSONDecoder(), ""
        self.line = 1

    def _read(self, num_chars: int) -> bool:
        try:
            more = _next(lambda: self._file.read(num_chars), f"{self._path}: after line {self.line}")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: after line {self.line}: not UTF-8 text: {error}") from error
        self._rest += more
        return bool(more)

    def skip(self) -> str:
        """The next character that is no white space; none at the end."""
        while True:
            found = self._rest.lstrip(" \t\r\n")
            self.line += self._rest[: len(self._rest) - len(found)].count("\n")
            self._rest = found
            if found or not self._read(_BLOCK_BYTES):
                return found[:1]

    def take(self) -> None:
        self._rest = self._rest[1:]

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether it is broken only because it ends, in the middle of a string or within a word or escape."""
        return error.pos > len(self._rest) - _ESCAPE_CHARS or error.msg.startswith("Unterminated string")

    def value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._rest)
            except json.JSONDecodeError as error:
                # Twice as much each time, so that long ones are not parsed once per block.
                if self._may_go_on(error) and self._read(max(_BLOCK_BYTES, len(self._rest))):
                    continue
                line = self.line + error.lineno - 1
                raise DataError(
                    f"{self._path}: line {line}, column {error.colno}: expected a JSON object, got a broken one:"
                    f" {error.msg}"
                ) from error
            except RecursionError as error:
                raise DataError(f"{self._path}: line {self.line}: it is nested too deeply") from error
            self.line += self._rest.count("\n", 0, end)
            self._rest = self._rest[end:]
            return value


def _record(path: Path, unit: str, number: int, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{path}: {unit} {number}: expected a JSON object, got {_type_of(value)}")
    return Record(path, unit, number, value)


def _type_of(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _open(path: Path) -> IO[bytes]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    try:
        if compression is None:
            return path.open("rb")
        pyarrow = _package("pyarrow", path)
        # Unlike other readers of zstd it notices where a file was cut short.
        return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), _BLOCK_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def _next(read: Any, place: str) -> Any:
    try:
        return read()
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {one_line(error)}") from error


def _read_parquet(path: Path) -> Iterator[Record]:
    parquet = _package("pyarrow.parquet", path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BLOCK_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(path, "row", number, values)
    except (OSError, ValueError) as error:
        # Arrow's errors are of these kinds.
        raise DataError(f"{path}: row {number + 1}: cannot be read as Parquet: {one_line(error)}") from error


def _read_dataset(path: Path) -> Iterator[Record]:
    datasets = _package("datasets", path)
    try:
        data = datasets.load_from_disk(str(path), keep_in_memory=False)
    except Exception as error:
        # datasets raises what comes.
        raise DataError(f"{path}: cannot be read as a folder of datasets: {one_line(error)}") from error
    if isinstance(data, datasets.DatasetDict):
        raise DataError(f"{path}: expected one split, got {sorted(data)}; name one: '{path}/{sorted(data)[0]}'")
    number = 0
    for first in range(0, len(data), _BLOCK_ROWS):
        try:
            columns = data[first : first + _BLOCK_ROWS]
        except Exception as error:
            raise DataError(f"{path}: row {first + 1}: cannot be read: {one_line(error)}") from error
        for values in zip(*columns.values(), strict=True):
            number += 1
            yield Record(path, "row", number, dict(zip(columns, values, strict=True)))


def _package(name: str, path: Path) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        raise DataError(
            f"{path}: expected the package {top} to read it, got none: pip install 'narrowgauge[data]'"
        ) from error
