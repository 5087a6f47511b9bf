"""What a filesystem is asked: which folders there are, how much room, of which type."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OffloadError


def to_folders(path: Any) -> list[Path]:
    """The folders that ``path`` names, with ``~`` and environment variables expanded; each exists.

    Raises:
        TypeError, ValueError: it is not a path or a sequence of paths, or names none.
        OffloadError: one is missing, or is no folder.
    """
    parts = [path] if isinstance(path, str | os.PathLike) else path
    if not isinstance(parts, Sequence) or not all(isinstance(part, str | os.PathLike) for part in parts):
        raise TypeError(f"path: expected a folder or a list of folders, got {path!r}")
    if not parts or not all(os.fspath(part) for part in parts):
        raise ValueError(f"path: expected at least one folder, and no empty name, got {path!r}")
    folders = []
    for part in parts:
        try:
            folder = Path(os.path.expandvars(part)).expanduser()
            is_folder, exists = folder.is_dir(), folder.exists()
        except OSError as error:
            raise OffloadError(f"{part}: cannot be used: {error.strerror}") from error
        except (RuntimeError, ValueError) as error:
            # No such user's home; a null byte.
            raise OffloadError(f"{part}: cannot be used: {error}") from error
        if not is_folder:
            raise OffloadError(f"{folder}: {'not a folder' if exists else 'no such folder'}")
        folders.append(folder)
    return folders


def available_bytes(folder: Path | int) -> int:
    """Free bytes of the filesystem that an ordinary user may take."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def total_bytes(folders: Sequence[Path]) -> int:
    """Capacity of the filesystems that the folders are on, each counted once."""
    sizes = {}
    for folder in folders:
        status = os.statvfs(folder)
        sizes[os.stat(folder).st_dev] = status.f_blocks * status.f_frsize
    return sum(sizes.values())


def filesystem_type(folder: Path) -> str:
    """The type of the filesystem a folder is on, as the kernel calls it."""
    best, kind = Path(), ""
    resolved = folder.resolve()
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split(" ")
        point = Path(mount.encode().decode("unicode_escape"))
        if resolved.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, found
    return kind
