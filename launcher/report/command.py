"""``narrowgauge report``."""

from pathlib import Path

from rich.console import Console

from narrowgauge.engine.errors import UserError
from narrowgauge.engine.files import write_text

from .images import write_images
from .page import page
from .runs import read_runs


def report(folders: list[Path], *, output: Path, png: Path | None, console: Console) -> None:
    """Write the page, and the charts as PNGs where they are asked for.

    Raises:
        UserError: a run folder does not hold, or a file cannot be written.
    """
    if output.is_dir():
        raise UserError(f"--output: expected a file, got the folder {output}")
    runs = read_runs(folders)
    text = page(runs)
    try:
        write_text(output, text)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from error
    console.print(
        f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(text) / 1024:,.0f} KiB", highlight=False
    )
    if png is not None:
        console.print(f"{png}: {len(write_images(runs, png))} PNGs", highlight=False)
