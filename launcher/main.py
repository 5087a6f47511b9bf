"""The ``narrowgauge`` command. Imports of torch and DeepSpeed wait until a command needs them."""

import os
import sys
from typing import Annotated

import typer

import narrowgauge
from narrowgauge.engine.config.redaction import redact_text
from narrowgauge.engine.errors import UserError
from narrowgauge.engine.ranks.environment import process_rank
from narrowgauge.engine.ranks.exit_codes import EXIT_BAD_INPUT, EXIT_PREEMPTED
from narrowgauge.engine.ranks.preemption import Preempted

from .commands import machine, runs, slurm

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train larger language models on fewer GPUs and slower networks: DeepSpeed ZeRO with compact gradients.",
)
for command in (runs.train, runs.launch, runs.export, machine.build, machine.doctor):
    app.command()(command)
app.add_typer(slurm.slurm, name="slurm")
app.add_typer(machine.bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"narrowgauge {narrowgauge.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by DeepSpeed's launcher.")] = -1,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


def main() -> None:
    """Run the command; bad input ends with its message on stderr and exit code 2, a preempted run with 75."""
    try:
        app()
    except UserError as error:
        if not error.on_all_ranks or process_rank() == 0:
            print(f"error: {redact_text(str(error))}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_BAD_INPUT)
    except Preempted as reason:
        if process_rank() == 0:
            print(reason, file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_PREEMPTED)
