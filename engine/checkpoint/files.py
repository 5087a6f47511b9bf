"""The files of a checkpoint: found, and checked against the manifest."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FORMAT_VERSION = 1
_STEP_FOLDER = re.compile(r"step-(\d+)")


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The finished ``step-N`` checkpoints in a folder, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and (path / "manifest.json").is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def verify_files(folder: Path, *, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Check every ``parts``-th file of a checkpoint against its manifest and read its ``state.json``.

    Raises:
        CheckpointError: naming the first file that is missing, of another size, or of another content.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint (manifest.json, state.json): {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{folder}: expected format {FORMAT_VERSION}, got {found}")
    if "state.json" not in manifest["files"] or not any(name.startswith("model") for name in manifest["files"]):
        raise CheckpointError(f"{folder / 'manifest.json'}: damaged: it names no state.json or no model")
    for name, expected in sorted(manifest["files"].items())[part::parts]:
        try:
            found = checksum(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: {error}") from error
        if found != expected:
            raise CheckpointError(f"{folder / name}: damaged: expected {expected}, got {found}")
    return state


def checksum(path: Path) -> dict[str, int]:
    """What the manifest says of a file: its bytes and their CRC-32."""
    value = size = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value, size = zlib.crc32(chunk, value), size + len(chunk)
    return {"bytes": size, "crc32": value}
