"""What choosing half of each batch is worth on a mixture with rare sources, against random halves and whole batches.

python -m benchmarks.coreset                    all rows and seeds; run it again to resume
python -m benchmarks.coreset --csv FILE         writes what has been found, and prints the table
python -m benchmarks.coreset --small            a tiny model and mixture, to see that everything works

Every run is a file in the results folder, named by its row, its seed and a hash of all its settings; a run that exists
is not made again, and one that is interrupted leaves nothing. Change a method's code and its results are stale: delete
its files. The rows are in `benchmarks.coreset_run`, the mixture in `benchmarks.coreset_data`.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.coreset_data import Sizes
from benchmarks.coreset_run import METHODS, RARE, Run, Task, read_result, saved_bytes, train
from benchmarks.results_file import Row, write_rows

SMALL = Task(
    hidden=32, layers=1, batch=8, steps=4, warmup_steps=1, sizes=Sizes(characters=900, entities=700, held_out=8)
)


def rows_of(folder: Path, task: Task, seeds: Sequence[int]) -> list[Row]:
    """A row of numbers for each method with results: means over seeds, and the spread."""
    rows = []
    for method in METHODS:
        found = [result for seed in seeds if (result := read_result(Run(method, seed, task), folder)) is not None]
        if not found:
            continue
        row: Row = {"method": method, "seeds": len(found)}
        for key in ("loss", "rare"):
            values = [result[key] for result in found]
            row |= {key: statistics.fmean(values), f"{key}_low": min(values), f"{key}_high": max(values)}
        row["tokens"] = statistics.fmean(result["tokens"] for result in found)
        row["rare_share"] = statistics.fmean(_rare(result) for result in found)
        for key in ("choice", "step"):
            row[f"{key}_ms"] = 1000 * statistics.median(result["seconds"][key] for result in found)
        rows.append(row)
    return rows


def _rare(result: dict[str, Any]) -> float:
    return sum(result["kept"].get(name, 0.0) for name in RARE)


def table(rows: Sequence[Row]) -> Table:
    """Losses with their lowest and highest seed; times of a step, and of the choice within it, in processor time."""
    shown = Table(title=f"means of {rows[0]['seeds']} seeds", title_justify="left")
    for heading in (
        "",
        "loss, all sources",
        "loss, rare sources",
        "tokens",
        "of rare sources",
        "choice",
        "step",
        "kept",
    ):
        shown.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        losses = [f"{row[key]:.3f} ({row[f'{key}_low']:.3f}-{row[f'{key}_high']:.3f})" for key in ("loss", "rare")]
        times = [f"{row[f'{key}_ms']:.0f} ms" for key in ("choice", "step")]
        kept = f"{row['saved_mib']:.1f} MiB" if "saved_mib" in row else "-"
        shown.add_row(row["method"], *losses, f"{row['tokens']:,.0f}", f"{row['rare_share']:.1%}", *times, kept)
    return shown


def main(words: Sequence[str] | None = None) -> int:
    """Returns how many runs were made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/coreset"), help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--csv", type=Path, help="write the numbers, and the bytes kept, here instead of training")
    parser.add_argument("--lr", type=float, help="another learning rate, the same for all")
    parser.add_argument("--small", action="store_true", help="a tiny model and mixture")
    options = parser.parse_args(words)
    task = SMALL if options.small else Task()
    task = replace(task, lr=options.lr) if options.lr is not None else task
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    made, console = 0, Console(width=160)
    for seed in range(options.seeds) if options.csv is None else ():
        for method in options.methods:
            run = Run(method, seed, task)
            if read_result(run, options.out) is None:
                result = train(run, options.out)
                console.print(f"{method}, seed {seed}: {result['loss']:.4f}, rare sources {result['rare']:.4f}")
                made += 1
    rows = rows_of(options.out, task, range(options.seeds))
    if options.csv is not None:
        for row in rows:
            row["saved_mib"] = saved_bytes(row["method"], task, options.out) / 2**20
        write_rows(options.csv, rows)
    console.print(table(rows))
    return made


if __name__ == "__main__":
    main()
