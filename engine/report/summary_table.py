"""The table at the end of a run. Light to import."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

# In ``bytes`` of a summary whose ``peak_memory`` is of the process, not of a GPU.
RESIDENT = "resident_before_model"
# What ``forecast`` of a summary has, for people.
FORETOLD = {
    "peak_tensor_memory": "memory in tensors, peak",
    # In summaries of earlier versions.
    "peak_memory": "memory in tensors, peak",
    "reduced_per_step": "reduced per step",
    "gathered_per_step": "gathered per step",
    "activations_per_step": "activations sent per step",
}


def peak_memory(sizes: Mapping[str, Any]) -> tuple[str, str] | None:
    """What ``bytes.peak_memory`` of a summary is, and its size; None where it has none."""
    if not isinstance(peak := sizes.get("peak_memory"), int | float):
        return None
    before = sizes.get(RESIDENT)
    if isinstance(before, int | float):
        return "peak memory of the process, per rank", f"{_mib(peak)} ({_mib(before)} before the model)"
    return "peak memory, per rank", _mib(peak)


def print_summary(summary: dict[str, Any], run_dir: str, console: Console) -> None:
    """The table at the end of a run."""
    sizes, seconds = summary["bytes"], summary["seconds"]
    losses = f"{_loss(summary['loss_first'])} -> {_loss(summary['loss_last'])}"
    table = Table(title=f"{summary['steps']} steps, {summary['tokens']:,} tokens", title_justify="left")
    for heading in (
        "",
        "this run",
        "dense AdamW, no offload" if "saved_activations_peak" in sizes else "dense AdamW",
        "ratio",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("training loss", losses)
    table.add_row("validation loss", f"{_loss(summary['eval_loss_first'])} -> {_loss(summary['eval_loss'])}")
    table.add_row("tokens per second", f"{summary['tokens_per_second']:,.0f}")
    if "mfu" in summary:
        table.add_row("model FLOPs utilization (MFU)", f"{summary['mfu']['median']:.1%}")
    for name, key in (
        ("reduced per step", "reduced_per_step"),
        ("gathered per step", "gathered_per_step"),
        ("optimizer state", "optimizer_state"),
    ):
        found, dense = sizes[key], sizes[f"{key}_dense"]
        table.add_row(f"{name}, per rank", _mib(found), _mib(dense), f"{found / dense:.2f}" if dense else "-")
    if "saved_activations_peak" in sizes:
        saved = sizes["saved_activations_peak"]
        for name, key in (
            ("median step", "saved_activations_resident_median"),
            ("peak", "saved_activations_peak_resident"),
        ):
            # Summaries of earlier versions have the peak only.
            if (resident := sizes.get(key)) is not None:
                ratio = f"{resident / saved:.2f}" if saved else "-"
                table.add_row(f"saved activations in memory, {name}", _mib(resident), _mib(saved), ratio)
        table.add_row("activations written per step", _mib(sizes["offload_written"]))
    if (memory := peak_memory(sizes)) is not None:
        table.add_row(*memory)
    table.add_row("step, median", f"{seconds['step_median']:.3f} s")
    console.print(table)
    if told := summary.get("forecast", {}):
        console.print(_told(told), highlight=False)
    if summary.get("sample"):
        console.print("[bold]sample:[/bold]")
        console.print(summary["sample"], markup=False, highlight=False)
    console.print(f"run folder: {run_dir}", highlight=False)


def _told(forecast: dict[str, Any]) -> str:
    """What was told ahead, and how far it was from what was measured."""
    if "unavailable" in forecast:
        return f"not told ahead: {forecast['unavailable']}"
    parts = []
    for key, name in FORETOLD.items():
        if key not in forecast:
            continue
        predicted, measured = forecast[key]["predicted"], forecast[key]["measured"]
        if predicted and measured:
            parts.append(f"{name} {_mib(predicted)} ({predicted / measured - 1:+.1%})")
    return "told ahead, against what was measured: " + (", ".join(parts) or "nothing that was measured")


def _mib(count: float) -> str:
    return f"{count / 2**20:,.2f} MiB"


def _loss(value: float | None) -> str:
    return f"{value:.3f}" if value is not None else "not finite"
