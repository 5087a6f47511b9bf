"""How fast a folder's disk is, and how much room it has."""

import shlex
from pathlib import Path

from narrowgauge.offload import OffloadError
from narrowgauge.offload.backends.probe import Speed, measure
from narrowgauge.offload.backends.threads import ThreadsBackend
from narrowgauge.offload.storage.filesystem import available_bytes, to_folders

from .finding import Finding, first_line, gibibytes

# Below, activation offload waits for the disk more than it is worth.
_FAST_ENOUGH = 1e9
_ROOM_ENOUGH = 10 << 30
# Bytes and seconds of the two measurements; the first tells how many bytes fit in the second's time.
_FIRST_BYTES, _MOST_BYTES, _SECONDS = 8 << 20, 512 << 20, 1.0
_PATIENCE = 20.0


def check_disk(path: Path) -> list[Finding]:
    """Measure a folder's disk, in one to two seconds where it does at least 12 MB/s."""
    subject = "disk"
    try:
        (folder,) = to_folders(path)
    except (OffloadError, ValueError) as error:
        return [Finding("error", subject, first_line(str(error)), f"mkdir -p {shlex.quote(str(path))}")]
    try:
        room = available_bytes(folder)
        speed = _measure(folder)
    except (OffloadError, OSError) as error:
        return [Finding("error", subject, first_line(str(error)), "choose another folder: --path FOLDER")]
    text = f"{path}: {speed.write / 1e9:.2f} GB/s write, {speed.read / 1e9:.2f} GB/s read"
    if min(speed.write, speed.read) < _FAST_ENOUGH:
        cure = "activation_offload.path: a folder on an NVMe SSD (narrowgauge bench io FOLDER measures one)"
        found = [Finding("warning", subject, f"{text}; activation offload needs 1 GB/s", cure)]
    else:
        found = [Finding("ok", subject, text)]
    if room < _ROOM_ENOUGH:
        cure = "free some: checkpoints and activation offload need room (logging.run_dir, activation_offload.path)"
        return [*found, Finding("warning", "free space", gibibytes(room), cure)]
    return [*found, Finding("ok", "free space", gibibytes(room))]


def _measure(folder: Path) -> Speed:
    backend = ThreadsBackend()
    first = measure(backend, folder, total_bytes=_FIRST_BYTES, timeout=_PATIENCE)
    # Written twice, read once.
    total = min(_MOST_BYTES, int(_SECONDS / (2 / first.write + 1 / first.read)))
    return measure(backend, folder, total_bytes=total, timeout=_PATIENCE) if total > _FIRST_BYTES else first
