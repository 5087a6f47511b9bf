"""The ``narrowgauge`` command. Imports of torch and DeepSpeed wait until a command needs them."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from narrowgauge.engine.config.redaction import redact_text
from narrowgauge.engine.errors import UserError
from narrowgauge.engine.ranks.environment import process_rank
from narrowgauge.engine.ranks.exit_codes import EXIT_BAD_INPUT, EXIT_PREEMPTED
from narrowgauge.engine.ranks.preemption import Preempted

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train larger language models on fewer GPUs and slower networks: DeepSpeed ZeRO with compact gradients.",
)

_CONFIG = Annotated[Path, typer.Argument(help="A JSON file: DeepSpeed's keys, and model, data, training, logging.")]
_SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value; may be given several times."),
]


@app.callback()
def _global_options(
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by DeepSpeed's launcher.")] = -1,
) -> None:
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


@app.command()
def train(
    config: _CONFIG,
    set_: _SET = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new folder beside an existing run.")] = False,
) -> None:
    """Train a model. Runs alone, under torchrun, and under deepspeed; resumes where its run folder has a checkpoint."""
    from narrowgauge.engine.config.json_file import apply_overrides, read_json
    from narrowgauge.engine.run_folder import finished_summary

    raw = read_json(config)
    apply_overrides(raw, set_ or [])
    run_dir = raw.get("logging", {}).get("run_dir") if isinstance(raw.get("logging"), dict) else None
    if isinstance(run_dir, str) and not fresh:
        summary = finished_summary(Path(run_dir).expanduser(), raw)
        if summary is not None:
            _show_finished(summary, run_dir)
            return
    _quieten()
    from narrowgauge.engine.run.train import train as run

    run(config, overrides=set_ or [], fresh=fresh, console=_console())


@app.command()
def launch(
    config: _CONFIG,
    set_: _SET = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="As of train.")] = False,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="Lines of 'NAME slots=N', reached over ssh; default /job/hostfile where there is one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the commands.")] = False,
) -> None:
    """Train on all GPUs of this machine, of a SLURM allocation or of the machines in a hostfile."""
    _quieten()
    from .launch.command import launch as run

    code = run(config, overrides=set_ or [], fresh=fresh, hostfile=hostfile, dry_run=dry_run, console=_console())
    raise typer.Exit(code)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    folder: Annotated[Path, typer.Argument(help="Where the Hugging Face model goes; made if it does not exist.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint to take; default the newest.")] = None,
) -> None:
    """Write a trained model as a Hugging Face folder that AutoModelForCausalLM.from_pretrained loads."""
    _quieten()
    from narrowgauge.engine.run.export import export_run

    source = export_run(run, folder, step=step)
    _console().print(f"{source} -> {folder}", highlight=False)


@app.command(name="build")
def build(
    aio: Annotated[bool, typer.Option("--aio", help="Also asynchronous I/O for activation offload (minutes).")] = False,
) -> None:
    """Build the extensions that DeepSpeed would otherwise compile in the middle of the first run."""
    _quieten()
    from narrowgauge.engine.backends.deepspeed.extensions import ensure_extensions

    built = ensure_extensions(console=_console(), aio=aio)
    _console().print(f"ready: {', '.join(built) if built else 'nothing to build on this machine'}", highlight=False)


@app.command()
def doctor(
    path: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder whose disk is measured.")] = Path("."),
    hostfile: Annotated[Path | None, typer.Option(help="Also check these hosts, and what is between them.")] = None,
    build: Annotated[bool, typer.Option("--build", help="First compile DeepSpeed's extensions (minutes).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Check this machine: what a run needs, what is missing, and what to type about it; exit code 1 on an error."""
    _quieten()
    from .doctor.command import doctor as run

    raise typer.Exit(run(path, hostfile=hostfile, build=build, as_json=as_json, console=_console()))


slurm_app = typer.Typer(no_args_is_help=True, help="Train as a SLURM job.")
app.add_typer(slurm_app, name="slurm")
_SCRIPT = Annotated[str, typer.Option(help="pretrain, finetune_1node or sweep.")]


@slurm_app.command()
def render(config: _CONFIG, set_: _SET = None, script: _SCRIPT = "pretrain") -> None:
    """Print the batch script of a configuration."""
    _quieten()
    from .slurm import render as run

    typer.echo(run(config, set_ or [], script), nl=False)


@slurm_app.command()
def submit(config: _CONFIG, set_: _SET = None, script: _SCRIPT = "pretrain") -> None:
    """Submit the batch script of a configuration; prints the job's number."""
    _quieten()
    from .slurm import submit as run

    typer.echo(run(config, set_ or [], script))


@slurm_app.command()
def status(config: _CONFIG, set_: _SET = None) -> None:
    """Show the progress of a configuration's run: step, loss, tokens/s, restarts."""
    _quieten()
    from .slurm import show_status

    show_status(config, set_ or [], _console())


bench_app = typer.Typer(no_args_is_help=True, help="Measure this machine.")
app.add_typer(bench_app, name="bench")


@bench_app.command(name="io")
def bench_io(
    path: Annotated[Path, typer.Argument(help="A folder on the SSD.")],
    total: Annotated[int, typer.Option(min=1, help="MiB written and read per figure.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Times each figure is taken.")] = 3,
) -> None:
    """Measure the I/O backends of activation offload on a folder's SSD."""
    _quieten()
    from .bench import bench_io as run

    run(path, total_mib=total, rounds=rounds, console=_console())


def _console() -> Console:
    # A file or a pipe has no width of its own; 80 columns would break the table.
    return Console() if sys.stdout.isatty() else Console(width=120)


def _show_finished(summary: dict[str, object], run_dir: str) -> None:
    if process_rank() == 0:
        from narrowgauge.engine.report.summary_table import print_summary

        console = _console()
        console.print(
            f"{run_dir} holds this run, finished; --fresh trains it again in a folder beside it", highlight=False
        )
        print_summary(summary, run_dir, console)


def _quieten() -> None:
    """Keep the libraries' chatter out of the run's own output; warnings about the user's model or data remain."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # torch announces renamed collectives at every call of DeepSpeed's.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(_KNOWN_TO_US))


_KNOWN_TO_US = (
    "Setting accelerator to CPU",
    "**** You are using ZeRO with an untested optimizer",
)


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
