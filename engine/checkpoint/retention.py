"""Which checkpoints of a run are deleted: only those that others, which hold, stand in for."""

import shutil
from pathlib import Path

from ..errors import CheckpointError
from .files import find_checkpoints, verify_files, versions_of

_Fingerprint = dict[str, tuple[int, int]]


class Retention:
    """Keeps the newest checkpoints that hold, in a folder of ``step-N`` ones; used on one process rank.

    A checkpoint is read as a whole once, and again when a file of it has another size or time since.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._good: dict[Path, _Fingerprint] = {}

    def vouch(self, folder: Path) -> None:
        """A checkpoint has just been read as a whole, by the run that goes on from it."""
        self._good[folder] = _fingerprint(folder)

    def saved(self, step: int) -> None:
        """Delete what is no longer needed now that the checkpoint of ``step`` is written.

        Later steps' are of another past, which this run could not continue from: they neither count nor go.
        """
        newest = self._folder / f"step-{step}"
        self._good[newest] = _fingerprint(newest)
        earlier = [path for number, path in find_checkpoints(self._folder) if number < step]
        num_kept = 1
        while earlier and num_kept < self._keep:
            num_kept += any(map(self._holds, versions_of(earlier.pop())))
        for path in earlier:
            for version in versions_of(path):
                self._good.pop(version, None)
                shutil.rmtree(version, ignore_errors=True)

    def _holds(self, folder: Path) -> bool:
        try:
            found = _fingerprint(folder)
            if self._good.get(folder) != found:
                verify_files(folder)
        except (CheckpointError, OSError):
            return False
        self._good[folder] = found
        return True


def _fingerprint(folder: Path) -> _Fingerprint:
    found = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}
