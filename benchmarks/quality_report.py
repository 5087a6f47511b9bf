"""The best run of each method: as a table, as Markdown, and as a plot of loss against memory."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.quality_run import Rates
from benchmarks.quality_sweep import BASELINE, Search
from benchmarks.quality_time import read_times

_MIB, _KIB = 1 << 20, 1 << 10
_COLUMNS = (
    "method",
    "validation loss",
    "against AdamW",
    "mean of seeds",
    "lr, others",
    "lr, matrices",
    "optimizer state",
    "against formula",
    "gradients",
    "added weights",
    "sent per step",
    "step",
    "optimizer step",
    "trained",
    "runs",
)


def best_results(search: Search, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each method with a result, the one of lowest loss, with ``runs``, ``finished`` and ``repeated`` added: the
    losses at its rates with other seeds.
    """
    found = {}
    for method in methods:
        template = _without_rates(search.run(method, Rates(1.0, 1.0, 1.0)).settings())
        results = [json.loads(path.read_text()) for path in search.folder.glob(f"{method.replace('/', '_')}-*.json")]
        results = [result for result in results if _without_rates(result["settings"]) == template]
        whole = [result for result in results if result["loss"] is not None]
        if whole:
            best = min(whole, key=lambda result: result["loss"])
            finished = search.progress(method).best is not None
            repeated = [search.loss_of(run) for run in search.repeated(method, Rates(**best["settings"]["rates"]))]
            losses = [loss for loss in repeated if loss is not None]
            found[method] = {**best, "runs": len(results), "finished": finished, "repeated": losses}
    return found


def _without_rates(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "rates"}


def memory_of(result: dict[str, Any]) -> int:
    """Bytes that the method needs beside the model's weights and activations."""
    return sum(result["bytes"][key] for key in ("optimizer", "gradients", "added_weights"))


def _rows(folder: Path, found: dict[str, dict[str, Any]]) -> list[list[str]]:
    base = found[BASELINE]["loss"] if BASELINE in found else None
    rows, times = [], read_times(folder)
    for method, result in found.items():
        size, rates = result["bytes"], result["settings"]["rates"]
        rows.append(
            [
                method if result["finished"] else f"{method} (unfinished)",
                f"{result['loss']:.4f}",
                f"{100 * (result['loss'] / base - 1):+.2f} %" if base is not None else "",
                _over_seeds([result["loss"], *result["repeated"]]),
                f"{rates['lr']:.3g}",
                f"{rates['matrix_lr']:.3g}",
                _size(size["optimizer"]),
                f"{100 * (size['optimizer'] / size['optimizer_formula'] - 1):+.2f} %",
                _size(size["gradients"]),
                _size(size["added_weights"]),
                _size(size["wire"]),
                *(_ratio(times.get(method, {}).get(phase)) for phase in ("step", "optimizer")),
                f"{result['parameters']['trained'] / 1e6:.2f} M",
                str(result["runs"]),
            ]
        )
    return rows


def _over_seeds(losses: list[float]) -> str:
    spread = f"{statistics.fmean(losses):.4f} ({min(losses):.4f}-{max(losses):.4f})"
    return spread if len(losses) > 1 else ""


def _ratio(figures: dict[str, Any] | None) -> str:
    return f"{figures['ratio']:.2f}x" if figures is not None else "not timed"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _MIB:.2f} MiB" if num_bytes >= _MIB else f"{num_bytes / _KIB:.1f} KiB"


def _title(search: Search, found: dict[str, dict[str, Any]]) -> str:
    task, any_result = search.task, next(iter(found.values()))
    beta2 = found[BASELINE]["settings"]["rates"]["beta2"] if BASELINE in found else "unknown"
    return (
        f"{any_result['parameters']['model'] / 1e6:.2f} M parameters, {task.steps} steps of"
        f" {task.batch * task.length} tokens, seed {task.seed}, beta2 {beta2}"
    )


def show_table(search: Search, found: dict[str, dict[str, Any]]) -> None:
    table = Table(title=_title(search, found), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    for row in _rows(search.folder, found):
        table.add_row(*row)
    Console(width=260).print(table)


def write_markdown(path: Path, search: Search, found: dict[str, dict[str, Any]]) -> None:
    lines = [
        f"{_title(search, found)}:",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|---|{'---:|' * (len(_COLUMNS) - 1)}",
        *(f"| {' | '.join(row)} |" for row in _rows(search.folder, found)),
    ]
    path.write_text("\n".join(lines) + "\n")


def plot(path: Path, search: Search, found: dict[str, dict[str, Any]]) -> None:
    """Loss against memory, one point per method, hollow where the search is not finished."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    families = sorted({method.split("-")[0] for method in found})
    for method, result in found.items():
        x, y = memory_of(result) / _MIB, result["loss"]
        color = f"C{families.index(method.split('-')[0])}"
        axes.scatter(x, y, edgecolors=color, facecolors=color if result["finished"] else "none")
        axes.annotate(method, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    if BASELINE in found:
        axes.axhline(found[BASELINE]["loss"], color="grey", linewidth=0.8, linestyle="--")
        axes.axhline(1.01 * found[BASELINE]["loss"], color="lightgrey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("optimizer state, gradients and added weights, MiB")
    axes.set_ylabel("validation loss at the best rates")
    axes.set_title(_title(search, found), fontsize=10)
    figure.savefig(path, dpi=150)
