"""docs/gpu.md from docs/gpu.json."""

from typing import Any

from benchmarks.gpu.stages import STAGES, Stage

_HEAD = """# On a GPU

Written by `make gpu` (`python -m benchmarks.gpu`) from `gpu.json`; do not edit. It runs every test and benchmark that
needs a GPU, each stage as a process with a time limit, and continues where it stopped: what is done is repeated only if
the code or the device has changed. It works in a plain checkout, without DeepSpeed.

Times are medians by CUDA events, the alternatives in turn; ratios are to the baseline of the same round, as median
(lower to upper quartile). Memory is that of tensors (`max_memory_allocated`); `reserved` is what PyTorch's allocator
holds for them.
"""


def render(record: dict[str, Any]) -> str:
    """The page for what was recorded."""
    stages = record.get("stages", {})
    return "\n".join([_HEAD, *(_section(stage, stages.get(stage.name)) for stage in STAGES.values())])


def _section(stage: Stage, record: dict[str, Any] | None) -> str:
    lines = [f"## {stage.title}", "", stage.text, ""]
    if record is None:
        return "\n".join([*lines, "Not run.", ""])
    lines.append(_state(record))
    if record["figures"]:
        lines += ["", *table(record["figures"])]
    return "\n".join([*lines, ""])


def _state(record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = f"{machine['device'] or 'CPU'}, driver {machine['driver']}, PyTorch {machine['torch']}"
    state = record["state"]
    if state != "done":
        state = f"**{state}**" + (f" ({record['reason']})" if record.get("reason") else "")
    return f"{where}, commit {record['commit']}: {state}, {record['seconds']:.0f} s."


def table(figures: list[dict[str, Any]]) -> list[str]:
    """Rows as a table, with the columns of all of them."""
    columns = list(dict.fromkeys(key for row in figures for key in row))
    texts = {"case", "shape", "dtype", "outcome", "I/O"}
    lines = [
        "| " + " | ".join("" if column == "case" else column for column in columns) + " |",
        "|" + "|".join("---" if column in texts else "---:" for column in columns) + "|",
    ]
    return lines + ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in figures]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, list):
        middle, low, high = value
        return f"{middle:.3f}x ({low:.3f}-{high:.3f})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|")
