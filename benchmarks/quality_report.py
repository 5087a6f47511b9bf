"""The best run of each method: as a table, as Markdown, and as a plot of loss against memory."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.labels import place_labels
from benchmarks.quality_run import Rates
from benchmarks.quality_sweep import BASELINE, Search
from benchmarks.quality_time import read_times
from benchmarks.results_file import Row

_MIB = 1 << 20
# The frozen matrices' loss against AdamW's, below which a task tells little of what trains them.
_LEAST_GAP = 1.05
FROZEN = "frozen"
_MARKED = "grass-columns-1/8"
_RIGHT: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 8, "color": "#44688c"}
_COLUMNS = (
    "method",
    "share of the gap",
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
    """Of each method with a result, the one of lowest loss, with ``runs``, ``finished``, ``matrix_rates`` (those
    tried), ``repeated`` (the losses at its rates with other seeds) and ``by_seed`` (the same and its own) added.
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
            again = search.repeated(method, Rates(**best["settings"]["rates"]))
            others = {run.task.seed: loss for run in again if (loss := search.loss_of(run)) is not None}
            rates = sorted({result["settings"]["rates"]["matrix_lr"] for result in results})
            more = {"runs": len(results), "finished": finished, "matrix_rates": rates}
            by_seed = {search.task.seed: best["loss"], **others}
            found[method] = {**best, **more, "repeated": list(others.values()), "by_seed": by_seed}
    return found


def _without_rates(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "rates"}


def rows_of(search: Search, found: dict[str, dict[str, Any]]) -> list[Row]:
    """A row of numbers for each method: losses, rates, sizes in MiB, times against AdamW."""
    rows, times = [], read_times(search.folder)
    base, frozen = (found[name]["loss"] if name in found else None for name in (BASELINE, FROZEN))
    for method, result in found.items():
        size, rates, tried = result["bytes"], result["settings"]["rates"], result["matrix_rates"]
        losses = [result["loss"], *result["repeated"]]
        seeds = [statistics.fmean(losses), min(losses), max(losses)] if len(losses) > 1 else [None] * 3
        shares = _shares_by_seed(found, method)
        spread = [statistics.fmean(shares), min(shares), max(shares)] if len(shares) > 1 else [None] * 3
        step, optimizer_step = (times.get(method, {}).get(phase, {}).get("ratio") for phase in ("step", "optimizer"))
        rows.append(
            {
                "method": method,
                "share_percent": share_of_gap(result["loss"], base, frozen),
                **dict(zip(("share_mean", "share_low", "share_high"), spread, strict=True)),
                "seeds": max(len(shares), 1),
                "loss": result["loss"],
                **dict(zip(("loss_mean", "loss_low", "loss_high"), seeds, strict=True)),
                "lr": rates["lr"],
                "matrix_lr": rates["matrix_lr"],
                "rates_tried": len(tried),
                "at_edge": "yes" if method != FROZEN and rates["matrix_lr"] in (tried[0], tried[-1]) else "no",
                "optimizer_mib": size["optimizer"] / _MIB,
                "above_formula_percent": 100 * (size["optimizer"] / size["optimizer_formula"] - 1),
                "gradients_mib": size["gradients"] / _MIB,
                "added_weights_mib": size["added_weights"] / _MIB,
                "sent_mib": size["wire"] / _MIB,
                "step_ratio": step,
                "optimizer_step_ratio": optimizer_step,
                "trained_millions": result["parameters"]["trained"] / 1e6,
                "runs": result["runs"],
                "finished": "yes" if result["finished"] else "no",
            }
        )
    return rows


def share_of_gap(loss: float, base: float | None, frozen: float | None) -> float | None:
    """How far a loss is from that of frozen matrices towards AdamW's, in percent; None where the two are not known or
    do not tell: less than 5 % apart.
    """
    if base is None or frozen is None or frozen < _LEAST_GAP * base:
        return None
    return 100 * (frozen - loss) / (frozen - base)


def _shares_by_seed(found: dict[str, dict[str, Any]], method: str) -> list[float]:
    """The method's shares of the gap, each with frozen matrices and AdamW of its own seed."""
    base, frozen = (found.get(name, {}).get("by_seed", {}) for name in (BASELINE, FROZEN))
    losses = found[method]["by_seed"].items()
    shares = [share_of_gap(loss, base.get(seed), frozen.get(seed)) for seed, loss in losses]
    return [share for share in shares if share is not None]


def curves_of(found: dict[str, dict[str, Any]]) -> list[Row]:
    """The losses of each method's best run as it goes, a row for each evaluation."""
    return [
        {"method": method, "step": int(step), "loss": loss}
        for method, result in found.items()
        for step, loss in result["losses"].items()
    ]


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as text, one string for each of ``_COLUMNS``."""
    base = next((row["loss"] for row in rows if row["method"] == BASELINE), None)
    return [
        [
            row["method"] if row["finished"] == "yes" else f"{row['method']} (unfinished)",
            f"{row['share_percent']:.0f} %" if row["share_percent"] is not None else "",
            f"{row['loss']:.4f}",
            f"{100 * (row['loss'] / base - 1):+.2f} %" if base is not None else "",
            _over_seeds(row),
            f"{row['lr']:.3g}",
            f"{row['matrix_lr']:.3g}",
            _size(row["optimizer_mib"]),
            f"{row['above_formula_percent']:+.2f} %",
            _size(row["gradients_mib"]),
            _size(row["added_weights_mib"]),
            _size(row["sent_mib"]),
            _ratio(row["step_ratio"]),
            _ratio(row["optimizer_step_ratio"]),
            f"{row['trained_millions']:.2f} M",
            f"{row['runs']:.0f}",
        ]
        for row in rows
    ]


def _over_seeds(row: Row) -> str:
    if row["loss_mean"] is None:
        return ""
    return f"{row['loss_mean']:.4f} ({row['loss_low']:.4f}-{row['loss_high']:.4f})"


def _ratio(ratio: float | None) -> str:
    return f"{ratio:.2f}x" if ratio is not None else "not timed"


def _size(mib: float) -> str:
    return f"{mib:.2f} MiB" if mib >= 1 else f"{1024 * mib:.1f} KiB"


def title_of(search: Search, found: dict[str, dict[str, Any]]) -> str:
    task, any_result = search.task, next(iter(found.values()))
    beta2 = found[BASELINE]["settings"]["rates"]["beta2"] if BASELINE in found else "unknown"
    return (
        f"{any_result['parameters']['model'] / 1e6:.2f} M parameters, {task.steps} steps of"
        f" {task.batch * task.length} tokens, seed {task.seed}, beta2 {beta2}"
    )


def show_table(search: Search, found: dict[str, dict[str, Any]]) -> None:
    table = Table(title=title_of(search, found), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    for row in _cells(rows_of(search, found)):
        table.add_row(*row)
    Console(width=260).print(table)


def write_markdown(path: Path, search: Search, found: dict[str, dict[str, Any]]) -> None:
    lines = [
        f"{title_of(search, found)}:",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|---|{'---:|' * (len(_COLUMNS) - 1)}",
        *(f"| {' | '.join(row)} |" for row in _cells(rows_of(search, found))),
    ]
    path.write_text("\n".join(lines) + "\n")


def plot(path: Path, rows: Sequence[Row], *, task: str) -> Any:
    """Draw loss against memory, one point per method, and mark the methods that match AdamW in less memory.

    Args:
        path: The PNG to write.
        rows: As :func:`rows_of` returns them; those that are not finished are drawn hollow.
        task: What was trained, for the title.

    Returns:
        The figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(memory_of(row), row["loss"]) for row in rows]
    for row, (x, y) in zip(rows, points, strict=True):
        color = _color(row["method"])
        axes.plot(x, y, "o", color=color, markerfacecolor=color if row["finished"] == "yes" else "white", zorder=3)
    axes.margins(x=0.12, y=0.12)
    title = "Validation loss against memory"
    by_name = {row["method"]: point for row, point in zip(rows, points, strict=True)}
    if BASELINE in by_name:
        memory, loss = by_name[BASELINE]
        axes.axhspan(0.99 * loss, 1.01 * loss, color="#dbe9f6", zorder=0)
        axes.axhline(loss, color="grey", linewidth=0.8, linestyle="--", zorder=1)
        axes.text(0.99, 1.01 * loss, "within 1 % of AdamW", transform=axes.get_yaxis_transform(), **_RIGHT)
        if _MARKED in by_name:
            share = by_name[_MARKED][0] / memory
            title = f"Grass on 1/8 of the columns: AdamW's loss with {share:.2f}x of its memory"
    axes.set_xlabel("optimizer state, gradients and added weights, MiB")
    axes.set_ylabel("validation loss at each method's best rates")
    axes.set_title(f"{title}\n", fontsize=11, fontweight="bold", loc="left")
    axes.text(0, 1.02, f"{task}; hollow: fewer rates tried", transform=axes.transAxes, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    names = [row["method"] for row in rows]
    place_labels(axes, points, names, [_style(name) for name in names])
    figure.savefig(path)
    return figure


def memory_of(row: Row) -> float:
    """MiB that the method needs beside the model's weights and activations."""
    return row["optimizer_mib"] + row["gradients_mib"] + row["added_weights_mib"]


def _color(method: str) -> str:
    return {BASELINE: "black", "grass": "#1f4e96"}.get(method.split("-")[0], "#b07d2b")


def _style(method: str) -> dict[str, Any]:
    bold = method in (BASELINE, _MARKED)
    return {"fontsize": 9 if bold else 8, "fontweight": "bold" if bold else "normal", "color": _color(method)}
