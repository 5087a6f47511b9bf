"""Activation offload against keeping, recomputing and copying: time, memory, and the disk against DeepSpeed's aio.

python -m benchmarks.offload --rounds 10             forward and backward of a LLaMA, all cases in turn
python -m benchmarks.offload --plot docs/offload.png the same, and the recompute-offload-keep curve
python -m benchmarks.offload --rss                   how much the process grows, each case in its own
python -m benchmarks.offload --io                    the I/O backend against a raw loop over DeepSpeed's aio
python -m benchmarks.offload --budget                twice the batch in less memory
python -m benchmarks.offload --leaks 500             what is left after so many steps
"""

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.compare import Phases, quartiles, ratios, show, write
from benchmarks.offload_cases import (
    DEFAULT,
    KEEP,
    LAYER_INPUTS,
    NAMES,
    RECOMPUTE,
    Case,
    OtherProcesses,
    make_cases,
)
from benchmarks.offload_checks import compare_budget, compare_io, compare_rss, look_for_leaks, one_rss
from benchmarks.offload_report import CURVE, plot, rows_of
from benchmarks.results_file import write_rows
from narrowgauge.offload.backends import backend_names

_MIB, _GB = 1 << 20, 1e9
_TRIES = 5


def compare_steps(arguments: argparse.Namespace) -> None:
    """All cases in turn, in an order that moves on by one each round."""
    names = list(arguments.cases)
    if arguments.plot is not None:
        names = [name for name in NAMES if name in {*names, *CURVE, "adaptive", "save_on_cpu", RECOMPUTE, LAYER_INPUTS}]
    cases = make_cases(arguments, names)
    console = Console(width=150, highlight=False)
    expected = cases[KEEP].gradients()
    for name, case in cases.items():
        # The adaptive plan is made in the first steps.
        for _ in range(6 if "adaptive" in name else 2):
            case.step()
        if not all(map(torch.equal, case.gradients(), expected)):
            console.print(f"{name}: other gradients than {KEEP}", style="bold")
        case.seen.clear()
    phases = {name: Phases() for name in cases}
    order, noise, again = list(cases), [], 0
    for number in range(arguments.rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            # Untimed: the heap is what the step before left of it, and that was another case's.
            cases[name].step()
            cases[name].forget_step()
            own, share, repeated = _quiet_step(cases[name], arguments.quiet)
            again += repeated
            phases[name].seconds = {key: phases[name].seconds.get(key, []) + own.seconds[key] for key in own.seconds}
            noise.append(share)
    low, middle, high = quartiles([100 * share for share in noise])
    console.print(
        f"other processes took {middle:.1f} % of the CPUs ({low:.1f}-{high:.1f}); {again} steps were repeated"
    )
    for case in cases.values():
        case.count(arguments.path)
    found = ratios(phases, KEEP)
    for name, case in cases.items():
        shares = [a / b for a, b in zip(case.seen["stall"], phases[name].seconds["step"], strict=False)]
        figures = {key: statistics.median(case.seen[key]) for key in ("saved", "resident", "written", "read")}
        found[name]["memory"] = {**figures, "resident": max(case.seen["resident"]), "stall_share": quartiles(shares)}
    report(console, arguments, found)
    if RECOMPUTE in cases and LAYER_INPUTS in cases:
        pair = {name: phases[name] for name in (RECOMPUTE, LAYER_INPUTS)}
        show(f"against {RECOMPUTE}", ratios(pair, RECOMPUTE))
    for name, case in cases.items():
        if case.offload is not None:
            stats = case.offload.stats()
            budget = f"{stats.offload_budget / _MIB:.0f} MiB planned, " if stats.offload_budget is not None else ""
            speeds = f"{stats.write_bandwidth / _GB:.2f} GB/s written, {stats.read_bandwidth / _GB:.2f} read"
            console.print(f"{name}: {stats.backend}, {budget}{speeds}, {stats.failed_writes + stats.full} not written")
        case.close()
    if arguments.json is not None:
        write(arguments.json, found, vars(arguments))
    if arguments.csv is not None:
        write_rows(arguments.csv, rows_of(found))
    if arguments.plot is not None:
        plot(arguments.plot, rows_of(found))


def _quiet_step(case: Case, limit: float) -> tuple[Phases, float, int]:
    """A step, the share of the CPUs that others had meanwhile, and how often it was repeated for that share's sake."""
    repeated = 0
    while True:
        with OtherProcesses() as others:
            phases = case.step()
        if others.share <= limit or repeated == _TRIES - 1:
            return phases, others.share, repeated
        case.forget_step()
        repeated += 1


def report(console: Console, arguments: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    where = "GPU memory" if arguments.device == "cuda" else "memory"
    table = Table(title=_title(arguments), title_justify="left")
    for column in ("", "step", "ratio", "forward", "backward", "saved", f"{where}, peak", "waited for I/O"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("written + read")
    base = found[KEEP]["memory"]["resident"]
    for name, figures in found.items():
        memory, step = figures["memory"], figures["step"]
        low, high = step["ratio_quartiles"]
        table.add_row(
            name,
            f"{step['seconds_median']:.3f} s",
            f"{step['ratio']:.3f}x ({low:.3f}-{high:.3f})",
            f"{figures['forward']['ratio']:.3f}x",
            f"{figures['backward']['ratio']:.3f}x",
            f"{memory['saved'] / _MIB:.0f} MiB",
            f"{memory['resident'] / _MIB:.0f} MiB {100 * (memory['resident'] / base - 1):+.0f} %",
            f"{100 * memory['stall_share'][1]:.2f} % (-{100 * memory['stall_share'][2]:.2f})",
            f"{memory['written'] / _MIB:.0f} + {memory['read'] / _MIB:.0f} MiB",
        )
    console.print(table)


def _title(arguments: argparse.Namespace) -> str:
    shape = f"hidden {arguments.hidden}, {arguments.layers} layers, {arguments.batch} x {arguments.sequence} tokens"
    return f"LLaMA, {shape}, {arguments.dtype}, {arguments.device}, {arguments.rounds} rounds: forward and backward"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--rss", action="store_true", help="growth of the process, each case in one of its own")
    mode.add_argument("--io", action="store_true", help="the backend against a raw loop over DeepSpeed's aio")
    mode.add_argument("--budget", action="store_true", help="twice the batch in the memory of one")
    mode.add_argument("--leaks", type=int, metavar="STEPS", help="what is left after so many steps of a small model")
    mode.add_argument("--rss-case", help=argparse.SUPPRESS)
    mode.add_argument("--plot", type=Path, metavar="PNG", help="draw time over memory, with more amounts kept")
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=DEFAULT, metavar="CASE", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--quiet",
        type=float,
        default=1.0,
        metavar="SHARE",
        help=f"repeat a step (at most {_TRIES} times) while other processes take more than this of the CPUs, as 0.05",
    )
    parser.add_argument("--path", type=Path, default=Path(tempfile.gettempdir()), help="folder on the SSD")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--backend", choices=backend_names(), default="auto")
    parser.add_argument("--lanes", type=int, help="default: ActivationOffload's")
    parser.add_argument("--buffer-mib", type=int, default=0, help="0: ActivationOffload's default")
    parser.add_argument("--capacity-mib", type=int, default=4096, help="of the slab, for --rss and --budget")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512, help="512 or more, a multiple of 64")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--csv", type=Path, help="write one row per case here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.hidden < 512 or arguments.hidden % 64:
        parser.error("--hidden: 512 or more, a multiple of 64")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds none")
    kept = (
        "path",
        "backend",
        "lanes",
        "buffer_mib",
        "capacity_mib",
        "layers",
        "hidden",
        "batch",
        "sequence",
        "vocab",
        "dtype",
    )
    arguments.given = [
        part
        for name in kept
        if getattr(arguments, name) is not None
        for part in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))
    ]
    return arguments


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    arguments = _arguments()
    if arguments.rss_case is not None:
        one_rss(arguments)
    elif arguments.rss:
        compare_rss(arguments)
    elif arguments.io:
        compare_io(arguments)
    elif arguments.budget:
        compare_budget(arguments)
    elif arguments.leaks:
        look_for_leaks(arguments)
    else:
        compare_steps(arguments)


if __name__ == "__main__":
    main()
