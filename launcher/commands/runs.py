"""``train``, ``data``, ``launch``, ``export`` and ``report``."""

from pathlib import Path
from typing import Annotated

import typer

from narrowgauge.engine.errors import UserError
from narrowgauge.engine.ranks.environment import process_rank, world_size

from ..output import make_console, show_libraries_less
from .arguments import ConfigArgument, SetOption, check_spelling_alone


def train(
    config: ConfigArgument,
    set_: SetOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new folder beside an existing run.")] = False,
    validate: Annotated[
        bool, typer.Option("--validate", help="Only check it, and print what each process rank would hold.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option("--world-size", min=1, help="Of --validate: the number of process ranks.")
    ] = None,
) -> None:
    """Train a model. Runs alone, under torchrun, and under deepspeed; resumes where its run folder has a checkpoint."""
    check_spelling_alone(config, set_ or [])
    if validate:
        _validate(config, set_ or [], ranks or world_size())
        return
    if ranks is not None:
        raise UserError("--world-size: expected --validate with it; a launcher says how many process ranks there are")
    from narrowgauge.engine.config.json_file import apply_overrides, read_json
    from narrowgauge.engine.files import local_path
    from narrowgauge.engine.run_folder import finished_summary

    raw = read_json(config)
    apply_overrides(raw, set_ or [])
    run_dir = raw.get("logging", {}).get("run_dir") if isinstance(raw.get("logging"), dict) else None
    if isinstance(run_dir, str) and not fresh:
        summary = finished_summary(local_path(run_dir, "logging.run_dir"), raw)
        if summary is not None:
            _show_finished(summary, run_dir)
            return
    show_libraries_less()
    from narrowgauge.engine.run.train import train as run

    run(config, overrides=set_ or [], fresh=fresh, console=make_console())


def _validate(config: Path, overrides: list[str], ranks: int) -> None:
    show_libraries_less()
    from narrowgauge.engine.run.validate import validate

    validate(config, world_size=ranks, overrides=overrides, console=make_console())


def _show_finished(summary: dict[str, object], run_dir: str) -> None:
    if process_rank() == 0:
        from narrowgauge.engine.report.summary_table import print_summary

        console = make_console()
        console.print(
            f"{run_dir} holds this run, finished; --fresh trains it again in a folder beside it", highlight=False
        )
        print_summary(summary, run_dir, console)


def data(config: ConfigArgument, set_: SetOption = None) -> None:
    """Show what a run would be trained on: ten samples, what of them is learned, and the lengths of each source."""
    check_spelling_alone(config, set_ or [])
    show_libraries_less()
    from narrowgauge.engine.data.show import show_data

    show_data(config, overrides=set_ or [], console=make_console())


def launch(
    config: ConfigArgument,
    set_: SetOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="As of train.")] = False,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="Lines of 'NAME slots=N', reached over ssh; default /job/hostfile where there is one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the commands.")] = False,
) -> None:
    """Train on all GPUs of this machine, of a SLURM allocation or of the machines in a hostfile."""
    check_spelling_alone(config, set_ or [])
    show_libraries_less()
    from ..launch.command import launch as run

    code = run(config, overrides=set_ or [], fresh=fresh, hostfile=hostfile, dry_run=dry_run, console=make_console())
    raise typer.Exit(code)


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    folder: Annotated[Path, typer.Argument(help="Where the Hugging Face model goes; made if it does not exist.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint to take; default the newest.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA run's adapter into its model.")] = False,
) -> None:
    """Write a trained model as a Hugging Face folder that AutoModelForCausalLM.from_pretrained loads; of a LoRA run its
    adapter, for peft.
    """
    show_libraries_less()
    from narrowgauge.engine.run.export import export_run

    source = export_run(run, folder, step=step, merge=merge)
    make_console().print(f"{source} -> {folder}", highlight=False)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Also write the charts as PNGs there.")] = None,
) -> None:
    """Write a page about one run, or several side by side: curves, timelines, restarts, differences."""
    show_libraries_less()
    from ..report.command import report as run

    run(runs, output=output, png=png, console=make_console())
