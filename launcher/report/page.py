"""The page of a report: tables and charts in one HTML file without scripts and without a network."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from typing import Any

import narrowgauge
from narrowgauge.engine.report.progress import duration
from narrowgauge.engine.report.summary_table import FORETOLD, RESIDENT, peak_memory

from .curves import AXES, charts_over
from .runs import Run
from .svg import COLOURS, draw, legend

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1d1d1f;--soft:#666;--line:#ddd;--head:#f4f4f5;
--c0:#0b62c4;--c1:#c2410c;--c2:#15803d;--c3:#a21caf;--c4:#a16207;--c5:#0e7490;--c6:#be123c;--c7:#4d4d4d}
@media(prefers-color-scheme:dark){:root{--back:#17181c;--text:#e8e8ea;--soft:#a5a5ad;--line:#3a3b42;--head:#22242a;
--c0:#6cb2ff;--c1:#fb923c;--c2:#4ade80;--c3:#e879f9;--c4:#facc15;--c5:#22d3ee;--c6:#fb7185;--c7:#c9c9c9}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1300px;padding:16px;background:var(--back);color:var(--text);
font:15px/1.45 system-ui,sans-serif}h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.15rem;margin:1.6em 0 .5em}
h3{font-size:1rem;margin:0}p{margin:.3em 0}.soft,.tick{color:var(--soft);fill:var(--soft)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 12px 4px 6px;border-bottom:1px solid var(--line);vertical-align:top}
thead th{background:var(--head)}td code{word-break:break-word}
.charts{display:none;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:20px}
figure{margin:0;min-width:0}svg{width:100%;height:auto;display:block}.tick{font-size:11px}
.grid{stroke:var(--line);stroke-width:.7}.curve{fill:none;stroke-width:1.6;stroke-linejoin:round}
circle.curve{fill:currentColor}.mark{stroke-width:1;stroke-dasharray:2 3;opacity:.8}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px}.legend span{display:flex;align-items:center;gap:5px;
overflow-wrap:anywhere}.sample{width:24px;height:8px;flex:none}
.axis{position:absolute;opacity:0}.axes label{display:inline-block;padding:4px 12px;border:1px solid var(--line);
border-radius:6px;margin:0 6px 10px 0;cursor:pointer}
"""


def page(runs: Sequence[Run]) -> str:
    """The whole file."""
    title = "narrowgauge: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    colours = "".join(f".c{n}{{stroke:var(--c{n});color:var(--c{n})}}" for n in range(COLOURS))
    chosen = "".join(
        f"#axis-{axis}:checked~.over-{axis}{{display:grid}}#axis-{axis}:checked~.axes label[for=axis-{axis}]"
        f"{{background:var(--head);font-weight:600}}#axis-{axis}:focus-visible~.axes label[for=axis-{axis}]"
        "{outline:2px solid var(--c0)}"
        for axis in AXES
    )
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            # No request for an icon.
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title><style>{_STYLE}{colours}{chosen}</style></head><body>",
            f'<h1>{escape(title)}</h1><p class="soft">narrowgauge {narrowgauge.__version__}, {made}</p>',
            "<h2>Runs</h2>",
            _overview(runs),
            _charts(runs),
            _forecast(runs),
            _interruptions(runs),
            _configurations(runs),
            "</body></html>\n",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, of_keys: bool = False) -> str:
    """Cells are text; ``of_keys``: the first ones are keys of a configuration."""

    def first(text: str) -> str:
        return f"<code>{escape(text)}</code>" if of_keys else escape(text)

    heads = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(
        f"<tr><th>{first(row[0])}</th>{''.join(f'<td>{escape(text)}</td>' for text in row[1:])}</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _overview(runs: Sequence[Run]) -> str:
    columns = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return _table(["", *(run.name for run in runs)], rows)


def _facts(run: Run) -> dict[str, str]:
    last, summary = run.records[-1], run.summary or {}
    sizes: Mapping[str, Any] = summary.get("bytes", {})
    found = {
        "folder": str(run.folder),
        "steps": f"{last['step']:,} of {run.resolved.get('steps', '?')}" + (", finished" if run.summary else ""),
        "process ranks": str(run.resolved.get("world_size", "?")),
        "training loss": _number(last.get("loss")),
        "validation loss": _number(run.evaluations[-1]["eval_loss"]) if run.evaluations else "",
        "tokens": f"{last.get('tokens', 0):,}",
        "tokens per second": _number(summary.get("tokens_per_second", last.get("tokens_per_second")), ",.0f"),
        "MFU": _number(summary.get("mfu", {}).get("median", last.get("mfu")), ".1%"),
        "time": duration(3600 * list(run.hours().values())[-1]) + ("" if run.has_times else " in steps"),
        "started again": str(max(0, len(run.starts) - 1)),
    }
    named = {
        "optimizer state per rank": "optimizer_state",
        "reduced per step": "reduced_per_step",
        "gathered per step": "gathered_per_step",
        "saved activations, peak": "saved_activations_peak",
        "of them in memory": "saved_activations_peak_resident",
    }
    for name, key in named.items():
        if isinstance(value := sizes.get(key), int | float):
            dense = sizes.get(f"{key}_dense")
            beside = f" ({value / dense:.2f} of dense AdamW's)" if isinstance(dense, int | float) and dense else ""
            found[name] = f"{value / 2**20:,.2f} MiB{beside}"
    if (memory := peak_memory(sizes)) is not None:
        found |= [memory]
    return {name: text for name, text in found.items() if text}


def _charts(runs: Sequence[Run]) -> str:
    parts = ["<h2>Curves</h2>"]
    for number, axis in enumerate(AXES):
        checked = " checked" if number == 0 else ""
        parts.append(f'<input class="axis" type="radio" name="axis" id="axis-{axis}"{checked}>')
    labels = "".join(f'<label for="axis-{axis}">over {axis}</label>' for axis in AXES)
    parts.append(f'<div class="axes">{labels}</div>')
    for axis, x_label in AXES.items():
        figures = "".join(
            f"<figure><h3>{escape(chart.title)}"
            + (f' <span class="soft">{escape(chart.unit)}</span>' if chart.unit else "")
            + f"</h3>{draw(chart, x_label)}{legend(chart)}</figure>"
            for chart in charts_over(axis, runs)
        )
        parts.append(f'<div class="charts over-{axis}">{figures}</div>')
    notes = []
    if any(len(run.starts) > 1 for run in runs):
        notes.append("Dotted upright lines: where a run went on after an interruption.")
    if untimed := [run.name for run in runs if not run.has_times]:
        notes.append(f"Over time: {', '.join(untimed)} recorded no times; its steps alone are added up.")
    return "".join([*parts, *(f'<p class="soft">{escape(note)}</p>' for note in notes)])


def _forecast(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        told = (run.summary or {}).get("forecast")
        if not isinstance(told, dict):
            continue
        if "unavailable" in told:
            rows.append([run.name, "", "", "", str(told["unavailable"])])
        for key, pair in told.items():
            if isinstance(pair, dict) and isinstance(ahead := pair.get("predicted"), int | float):
                found = pair.get("measured")
                measured = found if isinstance(found, int | float) else None
                error = f"{ahead / measured - 1:+.1%}" if measured else ""
                shown = _number(measured / 2**20, ",.2f") if measured is not None else "not measured"
                rows.append([run.name, FORETOLD.get(key, key.replace("_", " ")), f"{ahead / 2**20:,.2f}", shown, error])
    if not rows:
        return ""
    head = ["run", "MiB", "predicted", "measured", "error"]
    note = ""
    if any(RESIDENT in (run.summary or {}).get("bytes", {}) for run in runs):
        note = (
            '<p class="soft">Memory in tensors is what the run asked for from the model on, touched or not; the peak'
            " memory of a process, above, is the pages that it has touched, PyTorch and the data with them.</p>"
        )
    return "<h2>Prediction and measurement</h2>" + _table(head, rows) + note


def _interruptions(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        asked = {end.get("after_step") for end in run.ends}
        for number, start in enumerate(run.starts):
            after = start.get("after_step", 0)
            why = "" if number == 0 else "asked to end, saved" if after in asked else "failed or was killed"
            seconds = start.get("time")
            is_number = isinstance(seconds, int | float)
            when = datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S") if is_number else ""
            job = start.get("slurm_job") or ""
            rows.append([run.name, when, str(after), str(start.get("world_size", "")), str(start.get("host", ""))])
            rows[-1] += [str(job), why]
    if not rows:
        return ""
    head = ["run", "started (UTC)", "after step", "process ranks", "host", "SLURM job", "the one before"]
    return "<h2>Starts</h2>" + _table(head, rows)


def _configurations(runs: Sequence[Run]) -> str:
    keys = sorted({key for run in runs for key in run.config})
    rows = [[key, *(run.config.get(key, "") for run in runs)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    head = ["", *(run.name for run in runs)]
    parts = []
    if len(runs) > 1:
        parts.append("<h2>Differences of the configurations</h2>")
        parts.append(_table(head, differing, of_keys=True) if differing else "<p>None.</p>")
    whole = _table(head, rows, of_keys=True)
    return "".join([*parts, f"<h2>Configuration</h2><details><summary>all {len(keys)} keys</summary>{whole}</details>"])


def _number(value: Any, form: str = ".4f") -> str:
    return format(value, form) if isinstance(value, int | float) else ""
