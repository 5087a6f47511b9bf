"""``narrowgauge doctor``: what this machine has, what a run will miss, and what to type about it."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..hosts import Host, read_hostfile
from .finding import Finding, first_line

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(path: Path, *, hostfile: Path | None, build: bool, as_json: bool, console: Console) -> int:
    """Check this machine, and the hosts of a hostfile; returns the exit code, 1 where there is an error.

    Args:
        path: the folder whose disk is measured.
        build: compile DeepSpeed's extensions first.
        as_json: print the findings as a JSON list.

    Raises:
        UserError: the hostfile does not hold.
    """
    hosts = read_hostfile(hostfile) if hostfile is not None else []
    findings = []
    progress = Console(stderr=True)
    # Libraries print while they are imported.
    with contextlib.redirect_stdout(sys.stderr), progress.status("looking at this machine"):
        for finding in _findings(path, hosts, build, progress):
            findings.append(finding)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))  # noqa: T201
    else:
        _show(findings, console)
    return int(any(finding.status == "error" for finding in findings))


def _findings(path: Path, hosts: list[Host], build: bool, progress: Console) -> Iterator[Finding]:
    from .packages import check_apex, check_fused, check_imports, check_transformer_engine, check_versions
    from .system import check_limits, check_shared_memory

    yield from check_versions()
    broken = check_imports()
    yield from broken
    if not broken:
        from .extensions import build_extensions, check_compiler, check_extensions, check_io_backends
        from .gpus import check_gpus

        yield from _guarded("GPUs", check_gpus)
        if build:
            yield from build_extensions(progress)
        yield from _guarded("compiler", check_compiler)
        yield from _guarded("extensions", check_extensions)
        yield from _guarded("I/O backends", check_io_backends)
    yield from check_transformer_engine()
    yield from check_apex()
    yield from check_fused()
    if not broken:
        from .disk import check_disk

        yield from check_disk(path)
    yield from check_shared_memory()
    yield from check_limits()
    if hosts:
        from .hosts import check_hosts

        yield from check_hosts(hosts)


def _guarded(subject: str, check: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    """A check asks drivers and other packages, which may fail in ways of their own on a machine that is not well."""
    try:
        return check()
    except Exception as error:
        return [Finding("error", subject, first_line(error), "fix what the message names, then run this again")]


def _show(findings: Sequence[Finding], console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.status, _STYLES[finding.status]), Text(finding.subject), Text(finding.found))
    console.print(table)
    # Not in the table, which would break the lines.
    cures = [finding for finding in findings if finding.cure is not None]
    if cures:
        console.print()
    for finding in cures:
        console.print(Text(f"{finding.subject}: {finding.cure}"), soft_wrap=True)
