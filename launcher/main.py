"""The ``narrowgauge`` command. Imports of torch and DeepSpeed wait until a command needs them."""

import os
import socket
import sys
import threading
import traceback
from contextlib import suppress
from typing import Annotated

import typer

import narrowgauge
from narrowgauge.engine.config.redaction import redact_text
from narrowgauge.engine.errors import UserError, first_line
from narrowgauge.engine.ranks.environment import process_rank, world_size
from narrowgauge.engine.ranks.exit_codes import EXIT_BAD_INPUT, EXIT_PREEMPTED
from narrowgauge.engine.ranks.preemption import Preempted

from .commands import machine, plans, runs, slurm, start
from .output import show_warnings_as_lines

_SECONDS_TO_END = 4.0

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train larger language models on fewer GPUs and slower networks: DeepSpeed ZeRO with compact gradients.",
)
for command in (start.init, runs.train, plans.plan, runs.data, runs.launch, runs.export, runs.report):
    app.command()(command)
for command in (machine.build, machine.doctor):
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
    """Run the command. What ends it is one line on stderr: bad input with exit code 2, a preempted run with 75, all
    else with 1, and after a traceback where it is not the machine's fault either.
    """
    show_warnings_as_lines()
    try:
        app()
    except UserError as error:
        if not error.on_all_ranks or process_rank() == 0:
            _say(f"error: {redact_text(str(error))}")
        code = EXIT_BAD_INPUT
    except Preempted as reason:
        if process_rank() == 0:
            _say(str(reason))
        code = EXIT_PREEMPTED
    except OSError as error:
        _say_failure(error, with_traceback=error.filename is None)
        code = 1
    except Exception as error:
        _say_failure(error, with_traceback=type(error).__name__ != "RankFailed")
        code = 1
    else:
        return
    if world_size() > 1:
        _end_soon(code)
    sys.exit(code)


def _say_failure(error: Exception, *, with_traceback: bool) -> None:
    if with_traceback:
        traceback.print_exc()
    where = f"process rank {process_rank()} on {socket.gethostname()}: " if world_size() > 1 else ""
    kind = "" if isinstance(error, OSError) or not with_traceback else f"{type(error).__name__}: "
    _say(f"error: {where}{kind}{redact_text(first_line(error))}")


def _say(text: str) -> None:
    # Whoever read it may be gone.
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def _end_soon(code: int) -> None:
    """A rank that has failed must not stay because something of it does not end: the others wait for it."""
    end = threading.Timer(_SECONDS_TO_END, os._exit, (code,))
    end.daemon = True
    end.start()
