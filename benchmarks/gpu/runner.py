"""Running stages one after another, each as a process, and keeping what they say."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import render
from benchmarks.gpu.stages import ROOT, Stage

Command = Callable[[Stage], Sequence[str]]
_REASON_LENGTH = 300
# Of the machine: what makes other figures of it.
_DECIDE = ("device", "torch")


@dataclass(frozen=True, kw_only=True)
class Journal:
    """``gpu.json`` and the page made from it, in a folder."""

    folder: Path

    def read(self) -> dict[str, Any]:
        path = self.folder / "gpu.json"
        return json.loads(path.read_text()) if path.is_file() else {"stages": {}}

    def write(self, record: dict[str, Any]) -> None:
        for name, text in (("gpu.json", json.dumps(record, indent=1) + "\n"), ("gpu.md", render(record))):
            aside = self.folder / f".{name}.new"
            aside.write_text(text)
            aside.replace(self.folder / name)


def run_stages(
    stages: Sequence[Stage],
    *,
    journal: Journal,
    machine: dict[str, Any],
    commit: str,
    command: Command,
    budget: float | None = None,
    again: bool = False,
) -> bool:
    """Run those stages that are not done on this machine with this code; those never tried before come first.

    Args:
        machine: what the figures depend on.
        command: the command line of a stage's process, which prints a JSON object per line.
        budget: seconds; a stage whose limit is more than what is left of them is not begun.
        again: also those that are done.

    Returns:
        Whether all of them are done now.
    """
    started, complete = time.monotonic(), True
    record = journal.read()
    known = record["stages"]
    code = {stage.name: stage.code() for stage in stages}

    def is_same(stage: Stage) -> bool:
        own = known.get(stage.name)
        return (
            own is not None
            and own["code"] == code[stage.name]
            and all(own["machine"][key] == machine[key] for key in _DECIDE)
        )

    for stage in sorted(stages, key=is_same):
        if is_same(stage) and known[stage.name]["state"] == "done" and not again:
            _say(f"{stage.name}: done before")
            continue
        missing = stage.missing()
        if missing:
            _say(f"{stage.name}: left out, not installed: {', '.join(missing)}")
            complete = False
            continue
        left = budget - (time.monotonic() - started) if budget is not None else None
        if left is not None and stage.limit > left:
            _say(f"{stage.name}: not begun, it may take {stage.limit:g} s of the {left:.0f} s left")
            complete = False
            continue
        _say(f"{stage.name}: at most {stage.limit:g} s")
        own = known[stage.name] = {
            "machine": machine,
            "code": code[stage.name],
            "commit": commit,
            "state": "interrupted",
        }
        own |= {"reason": "", "seconds": 0.0, "figures": []}
        began = time.monotonic()

        def keep(figures: dict[str, Any], own: dict[str, Any] = own, began: float = began) -> None:
            own["figures"].append(figures)
            own["seconds"] = time.monotonic() - began
            journal.write(record)

        journal.write(record)
        own["state"], own["reason"] = _run(command(stage), stage.limit, keep)
        own["seconds"] = time.monotonic() - began
        journal.write(record)
        _say(f"{stage.name}: {own['state']} after {own['seconds']:.0f} s {own['reason']}")
        complete &= own["state"] == "done"
    return complete


def _say(text: str) -> None:
    print(text, flush=True)


def _run(command: Sequence[str], limit: float, keep: Callable[[dict[str, Any]], None]) -> tuple[str, str]:
    """Run a process to its end or its limit; its state, and the reason if it is not done."""
    process = subprocess.Popen(  # noqa: S603
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    errors: list[str] = []
    timer = threading.Timer(limit, end)
    reader = threading.Thread(target=_copy_errors, args=(process, errors))
    timer.start()
    reader.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            # The last line of a process that was ended may be half a line.
            if line.endswith("\n"):
                keep(json.loads(line))
        code = process.wait()
    except BaseException:
        end()
        process.wait()
        raise
    finally:
        timer.cancel()
        reader.join()
    if late.is_set():
        return "out of time", f"limit {limit:g} s"
    if code:
        return "failed", (errors[-1] if errors else f"exit code {code}")[:_REASON_LENGTH]
    return "done", ""


def _copy_errors(process: "subprocess.Popen[str]", errors: list[str]) -> None:
    """Show what the process says beside its figures, and keep the last line that is not empty."""
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)
        if line.strip():
            errors[:] = [line.strip()]
