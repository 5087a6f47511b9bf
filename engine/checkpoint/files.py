"""The files of a checkpoint: found, listed in a manifest that vouches for itself, and checked against it."""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import read_json, write_json
from .contents import check_finite_file, check_listed

FORMAT_VERSION = 2
# Its manifest has no digest of itself, and its tensors may hold what is not finite.
_WITHOUT_DIGEST = 1
_MANIFEST, _STATE = "manifest.json", "state.json"
_STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest holds: its ``state.json``, and the files that may be read of it.

    Attributes:
        names: of the files in ``folder``; any others there do not belong to it.
    """

    folder: Path
    names: tuple[str, ...]
    state: dict[str, Any]

    def tensors(self, begin: str) -> list[Path]:
        """Its safetensors files whose names begin so, in order."""
        return [self.folder / name for name in self.names if name.startswith(begin) and name.endswith(".safetensors")]


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The ``step-N`` checkpoints in a folder, oldest first, whole or damaged; see :func:`whole_folder`."""
    steps = set()
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(path.name.removesuffix(".old"))
        if match and path.is_dir():
            steps.add(int(match.group(1)))
    return [(step, whole_folder(folder / f"step-{step}")) for step in sorted(steps)]


def whole_folder(folder: Path) -> Path:
    """The checkpoint's folder, or the one it was replacing when the machine stopped between the two renames."""
    return next(iter(versions_of(folder)), folder)


def versions_of(folder: Path) -> list[Path]:
    """Of a checkpoint its folder and the one that it replaces, which a machine that stopped may have left: those that
    are there.
    """
    return [path for path in (folder, folder.with_name(folder.name + ".old")) if path.exists()]


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write what :func:`verify_files` checks: every file's :func:`checksum`, and a digest of the manifest itself."""
    content = {"format": FORMAT_VERSION, "files": dict(sorted(entries.items()))}
    write_json(folder / _MANIFEST, {**content, "sha256": _digest(content)})


def verify_files(folder: Path, *, part: int = 0, parts: int = 1) -> Checkpoint:
    """Check every ``parts``-th file of a checkpoint against its manifest and read its ``state.json``.

    Raises:
        CheckpointError: the manifest is damaged or lacks a file that must be there; or naming the first file that is
            missing, of another size, of another content, or holds what is not finite.
    """
    manifest, state = _read(folder / _MANIFEST), _read(folder / _STATE)
    version, files = manifest.get("format"), manifest.get("files")
    if version not in (FORMAT_VERSION, _WITHOUT_DIGEST):
        raise CheckpointError(f"{folder}: expected format {FORMAT_VERSION}, got {version}")
    if version == FORMAT_VERSION and manifest.get("sha256") != _digest({"format": version, "files": files}):
        raise CheckpointError(f"{folder / _MANIFEST}: damaged: its digest is not that of its contents")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / _MANIFEST}: damaged: it lists no files")
    check_listed(folder, files.keys(), state)
    for name, expected in sorted(files.items())[part::parts]:
        try:
            found = checksum(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: {error}") from error
        if found != expected:
            raise CheckpointError(f"{folder / name}: damaged: expected {expected}, got {found}")
        if version == _WITHOUT_DIGEST:
            check_finite_file(folder / name)
    return Checkpoint(folder, tuple(sorted(files)), state)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent}: not a whole checkpoint: {path.name}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: damaged: expected a JSON object, got {type(found).__name__}")
    return found


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> dict[str, int]:
    """What the manifest says of a file: its bytes and their CRC-32."""
    value = size = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value, size = zlib.crc32(chunk, value), size + len(chunk)
    return {"bytes": size, "crc32": value}
