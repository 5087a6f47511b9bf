"""``slurm``: batch scripts, jobs and their progress."""

from typing import Annotated

import typer

from ..output import make_console, show_libraries_less
from .arguments import ConfigArgument, SetOption

slurm = typer.Typer(no_args_is_help=True, help="Train as a SLURM job.")
_SCRIPT = Annotated[str, typer.Option(help="pretrain, finetune_1node or sweep.")]


@slurm.command()
def render(config: ConfigArgument, set_: SetOption = None, script: _SCRIPT = "pretrain") -> None:
    """Print the batch script of a configuration."""
    show_libraries_less()
    from ..slurm import render as run

    typer.echo(run(config, set_ or [], script), nl=False)


@slurm.command()
def submit(config: ConfigArgument, set_: SetOption = None, script: _SCRIPT = "pretrain") -> None:
    """Submit the batch script of a configuration; prints the job's number."""
    show_libraries_less()
    from ..slurm import submit as run

    typer.echo(run(config, set_ or [], script))


@slurm.command()
def status(config: ConfigArgument, set_: SetOption = None) -> None:
    """Show the progress of a configuration's run: step, losses, tokens/s, time left, restarts."""
    show_libraries_less()
    from ..slurm import show_status

    show_status(config, set_ or [], make_console())
