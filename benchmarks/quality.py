"""What the methods cost in loss, and what they save: one model, one order of the data, each method at its best rates.

python -m benchmarks.quality --jobs 2                            sweep all methods; run it again to resume
python -m benchmarks.quality --methods adamw 'grass-*'           only these (AdamW always: the others start from it)
python -m benchmarks.quality --report --csv FILE --plot PNG      what has been found, also while a sweep runs
python -m benchmarks.quality --time                              step times, interleaved, for the report

Every run is a file in the results folder, named by its method and a hash of all its settings; a run that exists is not
made again, and one that is interrupted leaves nothing. Change a method's code and its results are stale: delete its
files. How the rates are searched is stated in `benchmarks.quality_search`, what is trained in
`benchmarks.quality_methods`.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from benchmarks.quality_data import LONG, SMALL, WIDE, Task, Text
from benchmarks.quality_methods import METHODS
from benchmarks.quality_report import best_results, curves_of, plot, rows_of, show_table, title_of, write_markdown
from benchmarks.quality_sweep import BASELINE, Search, Sweep
from benchmarks.quality_time import compare_main, time_methods
from benchmarks.results_file import write_rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["*"], help=f"names or globs, of {', '.join(METHODS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the results")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each a process")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--steps", type=int, help="of a run; default 500")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data")
    parser.add_argument(
        "--repeats", type=int, default=0, help="more runs of each method at its best rates, other seeds"
    )
    parser.add_argument("--wide", action="store_true", help="a smaller model, 2,048 tokens a step, 400 steps")
    parser.add_argument("--long", action="store_true", help="the smallest model, prose, 512 tokens a step, 1,500 steps")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[], help="of the matrices: these alone, in the place of a search"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model and text, to see that everything works")
    parser.add_argument("--report", action="store_true", help="print the table instead of sweeping")
    parser.add_argument("--markdown", type=Path, help="write the table here instead of sweeping")
    parser.add_argument("--csv", type=Path, help="write the numbers here instead of sweeping")
    parser.add_argument("--curves", type=Path, help="write the losses over the steps here instead of sweeping")
    parser.add_argument("--plot", type=Path, help="draw loss against memory here, a PNG, instead of sweeping")
    parser.add_argument(
        "--time", action="store_true", help="measure step times, here and at a larger shape, instead of sweeping"
    )
    parser.add_argument("--rounds", type=int, default=15, help="of --time")
    parser.add_argument("--interval", type=int, default=200, help="of --time: steps that share a change of subspace")
    parser.add_argument("--json", type=Path, help="of --time: write the figures of the larger shape here")
    return parser


def _chosen(patterns: Sequence[str]) -> list[str]:
    """The methods that the globs name, in the order of the globs, after AdamW.

    Raises:
        SystemExit: a glob names none.
    """
    chosen = [BASELINE]
    for pattern in patterns:
        matches = [name for name in METHODS if fnmatchcase(name, pattern)]
        if not matches:
            raise SystemExit(f"--methods: {pattern!r} names none of {', '.join(METHODS)}")
        chosen += [name for name in matches if name not in chosen]
    return chosen


def _task(arguments: argparse.Namespace) -> Task:
    sizes = {"small": SMALL, "wide": WIDE, "long": LONG}
    size = next((task for name, task in sizes.items() if getattr(arguments, name)), Task())
    task = replace(size, seed=arguments.seed)
    if arguments.steps is None:
        return task
    return replace(task, steps=arguments.steps, warmup_steps=round(arguments.steps / 10))


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns how many runs were made.

    Raises:
        SystemExit: a method failed, or there is nothing to report.
    """
    arguments = _parser().parse_args(words)
    methods, task = _chosen(arguments.methods), _task(arguments)
    if arguments.time:
        torch.set_num_threads(arguments.threads)
        time_methods(task, methods, rounds=arguments.rounds, folder=arguments.out)
        compare_main(rounds=arguments.rounds, interval=arguments.interval, small=arguments.small, json=arguments.json)
        return 0
    search = Search(task, Text(task).fingerprint, arguments.out, repeats=arguments.repeats, matrix_lr=arguments.rates)
    if not (arguments.report or arguments.markdown or arguments.csv or arguments.curves or arguments.plot):
        sweep = Sweep(search, methods, jobs=arguments.jobs, threads=arguments.threads)
        count = sweep.execute()
        if sweep.failed:
            raise SystemExit(f"failed, see above: {', '.join(sorted(sweep.failed))}")
        print(f"{count} runs made, nothing is missing in {arguments.out}")
        return count
    found = best_results(search, methods)
    if not found:
        raise SystemExit(f"{arguments.out}: no results of {', '.join(methods)} at these settings")
    if arguments.report:
        show_table(search, found)
    if arguments.markdown:
        write_markdown(arguments.markdown, search, found)
    if arguments.csv:
        write_rows(arguments.csv, rows_of(search, found))
    if arguments.curves:
        write_rows(arguments.curves, curves_of(found))
    if arguments.plot:
        plot(arguments.plot, rows_of(search, found), task=title_of(search, found))
    return 0


if __name__ == "__main__":
    # So that the runs beside this process end with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
