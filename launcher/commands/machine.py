"""``build``, ``doctor`` and ``bench``: what this machine has and how fast it is."""

from pathlib import Path
from typing import Annotated

import typer

from ..output import make_console, show_libraries_less


def build(
    aio: Annotated[bool, typer.Option("--aio", help="Also asynchronous I/O for activation offload (minutes).")] = False,
) -> None:
    """Build the extensions that DeepSpeed would otherwise compile in the middle of the first run."""
    show_libraries_less()
    from narrowgauge.engine.backends.deepspeed.extensions import ensure_extensions

    console = make_console()
    built = ensure_extensions(console=console, aio=aio)
    console.print(f"ready: {', '.join(built) if built else 'nothing to build on this machine'}", highlight=False)


def doctor(
    path: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder whose disk is measured.")] = Path("."),
    hostfile: Annotated[Path | None, typer.Option(help="Also check these hosts, and what is between them.")] = None,
    build: Annotated[bool, typer.Option("--build", help="First compile DeepSpeed's extensions (minutes).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Check this machine: what a run needs, what is missing, and what to type about it; exit code 1 on an error."""
    show_libraries_less()
    from ..doctor.command import doctor as run

    raise typer.Exit(run(path, hostfile=hostfile, build=build, as_json=as_json, console=make_console()))


bench = typer.Typer(no_args_is_help=True, help="Measure this machine.")


@bench.command(name="io")
def bench_io(
    path: Annotated[Path, typer.Argument(help="A folder on the SSD.")],
    total: Annotated[int, typer.Option(min=1, help="MiB written and read per figure.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Times each figure is taken.")] = 3,
) -> None:
    """Measure the I/O backends of activation offload on a folder's SSD."""
    show_libraries_less()
    from ..bench import bench_io as run

    run(path, total_mib=total, rounds=rounds, console=make_console())
