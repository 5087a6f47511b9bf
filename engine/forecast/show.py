"""A forecast as tables for people. Light to import."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .forecast import Forecast
    from .held import Rank
    from .sent import Sent

    Ranks = Sequence[tuple[Rank, Sent]]

_GIB = 1 << 30
_GB = 1e9
# Columns of a table: the names, and each kind of process rank.
_FIRST, _EACH = 22, 16


def show(found: "Forecast", console: Console) -> None:
    """Print what each kind of process rank holds and sends; on a machine, also time and cost."""
    counts: dict[str, int] = {}
    for rank, _ in found.ranks:
        for key, numel in rank.counts.items():
            counts[key] = counts.get(key, 0) + numel
    whole = counts if len(found.ranks) == 1 else {**counts, "total": counts["total"]}
    console.print(
        f"{found.config.source}: {_millions(whole)} million parameters in {len(found.ranks)} kind(s) of process rank",
        highlight=False,
    )
    batches = found.batches
    console.print(
        f"{found.world_size} process ranks, {batches.total} sequences ({found.tokens_per_step:,} tokens) per step in"
        f" {batches.accumulation_steps} micro-batches of {batches.micro}",
        highlight=False,
    )
    for ranks in _in_width(found.ranks, console.width):
        console.print(_memory(found, ranks))
    for ranks in _in_width(found.ranks, console.width):
        console.print(_saved(ranks))
    console.print(_sent(found))
    console.print(f"checkpoint: {figure(found.checkpoint / _GB, 1)} GB", highlight=False)
    if found.machine is not None:
        _time(found, console)


def figure(value: float, places: int) -> str:
    """A number with ``places`` decimals, and more where they would show fewer than two digits of it."""
    if value and math.isfinite(value):
        places = max(places, 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def _millions(counts: Mapping[str, int]) -> str:
    parts = ", ".join(
        f"{key} {figure(counts[key] / 1e6, 1)}" for key in ("dense", "compact", "frozen") if counts.get(key)
    )
    return f"{figure(counts['total'] / 1e6, 1)} ({parts})"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    return table


def _in_width(ranks: "Ranks", width: int) -> list["Ranks"]:
    """As many as a table has room for beside each other, at a time."""
    size = max(1, (width - _FIRST) // _EACH)
    return [ranks[start : start + size] for start in range(0, len(ranks), size)]


def _memory(found: "Forecast", ranks: "Ranks") -> Table:
    """Kinds downwards."""
    table = _table("GiB per process rank, at its peak", "", *(rank.process_ranks for rank, _ in ranks))
    peaks = [rank.peak for rank, _ in ranks]
    table.add_row("when", *(peak.when for peak in peaks))
    if len(found.ranks) > 1:
        table.add_row("of the model", *(rank.what for rank, _ in ranks))
    for kind in peaks[0].bytes:
        if any(peak.bytes[kind] for peak in peaks):
            table.add_row(kind, *(figure(peak.bytes[kind] / _GIB, 2) for peak in peaks))
    table.add_section()
    table.add_row("all", *(figure(peak.total / _GIB, 2) for peak in peaks))
    if found.machine is not None:
        table.add_row("a GPU has", *[figure(found.machine.gpu.usable / _GIB, 2)] * len(peaks))
    return table


def _saved(ranks: "Ranks") -> Table:
    table = _table("MiB saved for backward, a micro-batch", "", *(rank.process_ranks for rank, _ in ranks))
    kinds = dict.fromkeys(kind for rank, _ in ranks for passes in rank.chunks for kind in passes.saved_by)
    for kind in kinds:
        row = [sum(passes.saved_by.get(kind, 0) for passes in rank.chunks) for rank, _ in ranks]
        table.add_row(kind, *(figure(nbytes / 2**20, 1) for nbytes in row))
    if any(rank.offloaded for rank, _ in ranks):
        table.add_row("of it on the drive", *(figure(sum(rank.offloaded) / 2**20, 1) for rank, _ in ranks))
    return table


def _sent(found: "Forecast") -> Table:
    machine = found.machine
    per_node = machine.gpus if machine is not None else found.world_size
    nodes = machine.nodes if machine is not None else 1
    table = _table("MB sent per step", "", "a process rank", "within a node", "out of a node")
    for name in ("reduced", "gathered", "activations"):
        nbytes: float = getattr(found.sent, name)
        # In a ring over all ranks one of a node's sends to another node; ranks that share layers are in one node, and
        # all of them may have their next stage in another.
        out = nbytes if name != "activations" else found.sent.stages * per_node
        out = out if nodes > 1 else 0.0
        table.add_row(name, *(figure(n / 1e6, 1) for n in (nbytes, nbytes * per_node - out, out)))
    return table


def _time(found: "Forecast", console: Console) -> None:
    machine, seconds = found.machine, found.seconds
    assert machine is not None
    assert seconds is not None
    parts: dict[str, Any] = vars(seconds)
    table = _table(f"seconds per step on {machine.described()}", "", "s", "share")
    for name, value in parts.items():
        if value:
            table.add_row(name, figure(value, 3), f"{value / seconds.step:.0%}")
    table.add_section()
    table.add_row("all", figure(seconds.step, 3), f"{figure(found.tokens_per_step / seconds.step, 0)} tokens/s")
    console.print(table)
    for line in machine.assumptions(offloads=found.written > 0):
        console.print(f"stated, not measured: {line}", highlight=False)
    if found.days is not None:
        hours = 24 * found.days * machine.world_size
        cost = f", {figure(hours * machine.price, 0)} at {machine.price:g} an hour" if machine.price is not None else ""
        console.print(
            f"{found.steps:,} steps: {figure(found.days, 2)} days, {figure(hours, 0)} GPU-hours{cost}", highlight=False
        )
    if found.written:
        _wear(found, console)


def _wear(found: "Forecast", console: Console) -> None:
    machine, options = found.machine, found.config.offload()
    assert machine is not None
    assert found.seconds is not None
    assert options is not None
    per_step, rated = found.written * machine.gpus, options.rated_tbw
    if found.steps is not None and found.days is not None and found.days < 1.0:
        total = per_step * found.steps
        worn = f", {figure(100 * total / (rated * 1e12), 1)}% of {rated:g} TB" if rated else ""
        rest = f"{figure(total / _GB, 1)} GB in the run{worn}"
    else:
        daily = per_step / found.seconds.step * 86400
        life = f"; {figure(rated * 1e12 / daily / 365.25, 1)} years of {rated:g} TB" if rated else ""
        rest = f"{figure(daily / 1e12, 1)} TB a day{life}"
    console.print(f"drives of a node: {figure(per_step / _GB, 1)} GB written per step, {rest}", highlight=False)
