"""``narrowgauge slurm``: batch scripts filled in from a configuration, their submission, and a run's progress."""

import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from narrowgauge.engine.config.config import Config, load_config
from narrowgauge.engine.config.launch_block import LaunchBlock
from narrowgauge.engine.config.slurm_block import SweepBlock
from narrowgauge.engine.errors import UserError, did_you_mean
from narrowgauge.engine.files import local_path, read_json
from narrowgauge.engine.report.metrics import read_metrics, start_records
from narrowgauge.engine.report.progress import duration
from narrowgauge.engine.run_folder import CONFIG, SUMMARY

# What the time left is reckoned from; that a run stood still in between is told by steps that seem to take so many
# times what they took.
_LATEST_STEPS, _INTERRUPTED = 50, 3.0
_STRICT = "set -euo pipefail"
SCRIPTS = ("pretrain", "finetune_1node", "sweep")


def render(config: Path, overrides: Sequence[str], script: str) -> str:
    """The batch script, with the values of ``launch.slurm`` in it.

    Raises:
        UserError: the configuration does not hold, or there is no such script.
    """
    if script not in SCRIPTS:
        raise UserError(
            f"--script: expected one of {', '.join(SCRIPTS)}, got {script!r}{did_you_mean(script, SCRIPTS)}"
        )
    checked = load_config(config, overrides)
    block = (checked.parsed.launch or LaunchBlock()).slurm
    lines = files("narrowgauge.slurm").joinpath(f"{script}.sbatch").read_text().splitlines()
    options = block.options
    if script == "sweep":
        if block.sweep is not None:
            for value in block.sweep.values:
                # Each job's own, before any waits in the queue.
                load_config(config, [*overrides, f"{block.sweep.key}={value}"])
            options = {"array": _array(block.sweep), **options}
            _fill_in_sweep(lines, block.sweep)
    elif block.sweep is not None:
        raise checked.error(f"launch.slurm.sweep: expected --script sweep with it, got {script}")
    for key, value in options.items():
        _fill_in(lines, key, value)
    if block.setup:
        begins = lines.index(_STRICT)
        # Not -u: modules and conda read variables that are not set.
        lines[begins:begins] = ["set -eo pipefail", *block.setup]
    return "\n".join(lines) + "\n"


def _fill_in(lines: list[str], key: str, value: str | int | bool | None) -> None:
    """Put an option where the script has it, or below the last one; without a value, take it out."""
    places = [i for i, text in enumerate(lines) if text == f"#SBATCH --{key}" or text.startswith(f"#SBATCH --{key}=")]
    if value is None or value is False:
        for place in reversed(places):
            del lines[place]
        return
    text = f'"{value}"' if " " in str(value) else str(value)
    line = f"#SBATCH --{key}" if value is True else f"#SBATCH --{key}={text}"
    if places:
        lines[places[0]] = line
    else:
        last = max(i for i, text in enumerate(lines) if text.startswith("#SBATCH"))
        lines.insert(last + 1, line)


def _array(sweep: SweepBlock) -> str:
    return f"0-{len(sweep.values) - 1}" + (f"%{sweep.at_once}" if sweep.at_once is not None else "")


def _fill_in_sweep(lines: list[str], sweep: SweepBlock) -> None:
    for name, text in (("key", sweep.key), ("values", f"({' '.join(map(str, sweep.values))})")):
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}=")]
        lines[place] = f"{name}={text}"


def submit(config: Path, overrides: Sequence[str], script: str) -> str:
    """Submit the batch script; returns the job's number.

    Raises:
        UserError: the configuration does not hold, there is no SLURM, or it refuses the job.
    """
    words = [_program("sbatch"), "--parsable", "/dev/stdin", str(config)]
    words += [word for text in overrides for word in ("--set", text)]
    done = subprocess.run(  # noqa: S603
        words, input=render(config, overrides, script), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise UserError(f"sbatch: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def show_status(config: Path, overrides: Sequence[str], console: Console) -> None:
    """Print how far the run of a configuration is.

    Raises:
        UserError: the configuration does not hold, or its run has not begun.
    """
    checked = load_config(config, overrides)
    run_dir = _run_dir(checked)
    starts = start_records(run_dir)
    if not starts:
        raise UserError(f"{run_dir}: no run has begun there")
    records, evaluations = read_metrics(run_dir)
    assert checked.parsed.training is not None
    table = Table(show_header=False)
    last = records[-1] if records else None
    step = last["step"] if last is not None else 0
    num_steps = checked.parsed.training.steps or _steps_of(run_dir)
    table.add_row("step", f"{step} of {num_steps}")
    if last is not None:
        table.add_row("loss", f"{last['loss']:.4f}")
    if evaluations:
        found = evaluations[-1]
        value = found["eval_loss"]
        table.add_row(
            "validation loss", f"{value:.4f} after step {found['step']}" if value is not None else "not finite"
        )
    if last is not None:
        table.add_row("tokens/s", f"{last.get('tokens_per_second', 0):,.0f}")
        if isinstance(last.get("mfu"), float):
            table.add_row("MFU", f"{last['mfu']:.1%}")
        per_step = _seconds_per_step(records)
        if per_step is not None and isinstance(num_steps, int) and step < num_steps:
            table.add_row("left", f"{duration(per_step * (num_steps - step))} of training")
    table.add_row("restarts", str(len(starts) - 1))
    job = starts[-1].get("slurm_job")
    state = "finished" if (run_dir / SUMMARY).is_file() else _job_state(job) if job else "not known: not a SLURM job"
    table.add_row("state", f"{state} (job {job})" if job else state)
    console.print(table)


def _seconds_per_step(records: Sequence[dict[str, Any]]) -> float | None:
    """Of the latest steps, with what was between them; of runs of earlier versions, which have no times, without."""
    latest = records[-_LATEST_STEPS:]
    begin, end = (record.get("time") for record in (latest[0], latest[-1]))
    steps = latest[-1]["step"] - latest[0]["step"]
    waited = end - begin if steps and isinstance(begin, float) and isinstance(end, float) else None
    alone = [each for record in latest if isinstance(each := record["seconds"].get("step"), float)]
    middle = median(alone) if alone else None
    if waited is None or middle is None or waited / steps > _INTERRUPTED * middle:
        return middle
    return waited / steps


def _steps_of(run_dir: Path) -> int | str:
    """How many steps a run's epochs are, as it has found."""
    try:
        return read_json(run_dir / CONFIG)["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return "?"


def _run_dir(config: Config) -> Path:
    if config.parsed.logging is None or config.parsed.training is None:
        raise config.error("logging and training: expected these blocks, got none")
    return local_path(config.parsed.logging.run_dir, "logging.run_dir")


def _job_state(job: str) -> str:
    found = subprocess.run(  # noqa: S603
        [_program("squeue"), "--noheader", "--format=%T", "--jobs", job], capture_output=True, text=True, check=False
    )
    return found.stdout.strip().lower() or "not in the queue"


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"expected SLURM, got no {name} on PATH")
    return found
