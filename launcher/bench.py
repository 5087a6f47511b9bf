"""``narrowgauge bench``: how fast this machine is where it matters to a run."""

import statistics
from pathlib import Path

from narrowgauge.engine.errors import UserError
from narrowgauge.offload import OffloadError
from narrowgauge.offload.backends import available_backends, make_backend
from narrowgauge.offload.probe import Speed, measure
from rich.console import Console
from rich.table import Table

BLOCKS_MIB = (1, 4, 16)
LANES = (1, 2, 4)


def bench_io(path: Path, *, total_mib: int, rounds: int, console: Console) -> None:
    """Print the write and read speed of each I/O backend on ``path``, and which one activation offload would take.

    Raises:
        UserError: the path is no folder, cannot be written to, or has no room.
    """
    import torch

    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    backends, missing = available_backends()
    table = Table(title=f"GB/s on {path}, {total_mib} MiB, median of {rounds}", title_justify="left")
    for heading in ("backend", "block", "lanes", "write", "read"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    try:
        for block in BLOCKS_MIB:
            for lanes in LANES:
                found: dict[str, list[Speed]] = {backend.name: [] for backend in backends}
                for _ in range(rounds):
                    for backend in backends:
                        speed = measure(
                            backend, path, block_bytes=block << 20, lanes=lanes, total_bytes=total_mib << 20
                        )
                        found[backend.name].append(speed)
                for name, speeds in found.items():
                    write, read = (
                        statistics.median(getattr(s, way) for s in speeds) / 1e9 for way in ("write", "read")
                    )
                    table.add_row(name, f"{block} MiB", str(lanes), f"{write:.2f}", f"{read:.2f}")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen, speed = make_backend("auto", path, device)
    except (OffloadError, OSError) as error:
        raise UserError(str(error)) from error
    console.print(table)
    for name, reason in missing.items():
        console.print(f"{name}: not available: {reason}", highlight=False)
    console.print(
        f"activation offload would use: {chosen.name} ({speed.write / 1e9:.2f} GB/s write, {speed.read / 1e9:.2f} GB/s"
        f" read, for tensors on {device.type})",
        highlight=False,
    )
