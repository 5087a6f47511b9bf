"""``narrowgauge bench``: how fast this machine is where it matters to a run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.live import Live
from rich.table import Table

from narrowgauge.engine.errors import UserError
from narrowgauge.offload import OffloadError
from narrowgauge.offload.backends import IOBackend, available_backends, make_backend
from narrowgauge.offload.backends.probe import Speed, measure
from narrowgauge.offload.storage.filesystem import available_bytes, to_folders

BLOCKS_MIB = (1, 4, 16)
LANES = (1, 2, 4)


def bench_io(path: Path, *, total_mib: int, rounds: int, console: Console) -> None:
    """Print the write and read speed of each I/O backend on ``path``, and which one activation offload would take.

    Args:
        total_mib: written (twice: the first time is not counted) and read for each figure.

    Raises:
        UserError: the path is no folder, cannot be written to, or has no room.
    """
    import torch

    try:
        (folder,) = to_folders(path)
        room = available_bytes(folder)
    except (OffloadError, ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if total_mib << 20 > room // 2:
        raise UserError(f"--total: expected at most half of the free space, {room >> 21} MiB, got {total_mib} MiB")
    backends, missing = available_backends()
    figures = sum(size <= total_mib for size in BLOCKS_MIB) * len(LANES) * len(backends)
    console.print(f"writing {2 * rounds * figures * total_mib / 1024:.1f} GiB to {folder}", highlight=False)
    table = Table(title=f"GB/s on {folder}, {total_mib} MiB, median of {rounds}", title_justify="left")
    for heading in ("backend", "block", "lanes", "write", "read"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    try:
        with Live(table, console=console):
            for block in [size for size in BLOCKS_MIB if size <= total_mib]:
                for lanes in LANES:
                    for name, speed in _interleaved(backends, folder, block << 20, lanes, total_mib << 20, rounds):
                        row = (f"{block} MiB", str(lanes), f"{speed.write / 1e9:.2f}", f"{speed.read / 1e9:.2f}")
                        table.add_row(name, *row)
        if not console.is_terminal:
            console.print()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen, speed = make_backend("auto", folder, device)
    except (OffloadError, OSError) as error:
        raise UserError(str(error)) from error
    for name, reason in missing.items():
        console.print(f"{name}: not available: {reason}", highlight=False)
    console.print(
        f"activation offload would use: {chosen.name} ({speed.write / 1e9:.2f} GB/s write, {speed.read / 1e9:.2f} GB/s"
        f" read, for tensors on {device.type})",
        highlight=False,
    )


def _interleaved(
    backends: Sequence[IOBackend], folder: Path, block_bytes: int, lanes: int, total_bytes: int, rounds: int
) -> Iterator[tuple[str, Speed]]:
    """The median speeds of each backend, measured in turn."""
    found: dict[str, list[Speed]] = {backend.name: [] for backend in backends}
    for _ in range(rounds):
        for backend in backends:
            speed = measure(backend, folder, block_bytes=block_bytes, lanes=lanes, total_bytes=total_bytes)
            found[backend.name].append(speed)
    for name, speeds in found.items():
        yield name, Speed(*(median(getattr(speed, way) for speed in speeds) for way in ("write", "read")))
