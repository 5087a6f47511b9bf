"""Files and folders that are written aside and renamed: a reader finds the old one or the new one, also after a power
cut. Light to import.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError


def local_path(text: str, key: str) -> Path:
    """A path as the user gives it, ``~`` and ``~user`` replaced.

    Args:
        key: the configuration key, for messages.

    Raises:
        UserError: no file can have this name, or be looked for there.
    """
    if "\0" in text:
        raise UserError(f"{key}: expected a path, got {text!r} with a NUL character")
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError as error:
        raise UserError(f"{key}: expected a path, got {text!r}: there is no such user, or no home folder") from error
    except OSError as error:
        # Too long a name, or a folder that may not be read.
        raise UserError(f"{key}: {error}") from error
    return path


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or nested so deeply that nobody can have meant it.
    """
    return parse_json(path.read_text())


def parse_json(text: str) -> Any:
    """As ``json.loads``, whose error at deep nesting is no ``ValueError``."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def finite(value: Any) -> Any:
    """A JSON value with null in the place of NaN and infinities, for which JSON has no words."""
    if isinstance(value, dict):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Replace a file in one go.

    Raises:
        OSError: naming the file, which is as it was.
    """
    aside = path.with_name(path.name + ".tmp")
    with naming(path):
        try:
            aside.write_text(text)
            _sync(aside)
            aside.replace(path)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise
        _sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing to a file name it: Python's do not where the file is already open (full disk, file limit)."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_new(path: Path, option: str) -> None:
    """Whether a file can be written that is not there yet, as far as its name says.

    Raises:
        UserError: naming the option.
    """
    if path.exists():
        raise UserError(f"{option}: expected a file that is not there yet, got {path}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option}: expected a file in a folder that is there, got {path}")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one go."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def replace_folder(aside: Path, folder: Path) -> None:
    """Give a folder, whose files lie directly in it, the name of another, which is deleted.

    Between the two renames there is only ``NAME.old``, as the other was.
    """
    for path in aside.iterdir():
        _sync(path)
    _sync(aside)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make what was written to a file, or the names in a folder, last a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
