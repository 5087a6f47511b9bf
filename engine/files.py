"""Files and folders that are written aside and renamed: a reader finds the old one or the new one, also after a power
cut. Light to import.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import UserError


def local_path(text: str, key: str) -> Path:
    """A path as the user gives it, ``~`` and ``~user`` replaced.

    Args:
        key: the configuration key, for messages.

    Raises:
        UserError: no file can have this name.
    """
    if "\0" in text:
        raise UserError(f"{key}: expected a path, got {text!r} with a NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}: expected a path, got {text!r}: there is no such user, or no home folder") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file in one go."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    _sync(aside)
    aside.replace(path)
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one go."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def replace_folder(aside: Path, folder: Path) -> None:
    """Give a folder, whose files lie directly in it, the name of another, which is deleted."""
    for path in aside.iterdir():
        _sync(path)
    _sync(aside)
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old)
    else:
        aside.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Make what was written to a file, or the names in a folder, last a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
