"""Results as JSON files, one for each run, named after what it was asked to do."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def result_path(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """Where the result of a run with these settings is, or will be."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{name}-{digest}.json"


def read_result(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write it in one go; other processes may write the same."""
    aside = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        aside.write_text(json.dumps(result, indent=1) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
