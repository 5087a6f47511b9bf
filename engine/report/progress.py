"""The live view of a run on process rank 0: one line that changes on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from .tags import perplexity

_SECONDS_BETWEEN_LINES = 10.0
_LEAST_BAR, _LARGEST_BAR = 10, 40
# What is left out first where the line is too narrow stands last.
_ORDER = ("loss", "left", "tokens", "mfu", "memory", "ppl", "grad", "lr")
_PLACES = ("loss", "ppl", "grad", "lr", "tokens", "mfu", "memory", "left")


class ProgressView:
    """Shows step, loss, perplexity, gradient norm, learning rate, tokens per second, MFU, memory and the time left, as
    many of them as there is room for.
    """

    def __init__(self, console: Console, *, first_step: int, num_steps: int) -> None:
        self._console, self._num_steps, self._first_step = console, num_steps, first_step
        self._bar: Progress | None = None
        self._started = self._last_line = time.monotonic()
        if console.is_terminal:
            self._bar = Progress(_Line(console), console=console)
            self._task = self._bar.add_task("", total=num_steps, completed=first_step, parts={})

    def __enter__(self) -> "ProgressView":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """Show a step's record, as ``metrics.jsonl`` has it."""
        now = time.monotonic()
        if step == self._first_step + 1:
            self._started = now
        timed = step - self._first_step - 1
        left = (now - self._started) / timed * (self._num_steps - step) if timed else None
        parts = shown_parts(record, left)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, parts=parts)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or step in (self._first_step + 1, self._num_steps):
            self._last_line = now
            head = f"step {step}/{self._num_steps}"
            with suppress(OSError):
                # Whoever read it may be gone, and the run goes on to save.
                self._console.print(
                    f"{head}  {fitted(parts, self._console.width - len(head) - 2)}", highlight=False, soft_wrap=True
                )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with suppress(OSError):
            (self._bar.console if self._bar is not None else self._console).print(text, highlight=False)


class _Line(ProgressColumn):
    """The whole line, made anew for the terminal's width."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        return progress_line(int(task.completed), int(task.total or 0), task.fields["parts"], self._console.width)


def progress_line(step: int, num_steps: int, parts: Mapping[str, str], width: int) -> Text:
    """``step ━━━━ 12/100  loss ...`` of at most ``width`` characters."""
    count = f"{step}/{num_steps}"
    room = width - len(f"step  {count}") - 2 - _LEAST_BAR
    text = fitted(parts, room)
    bar = max(0, min(_LARGEST_BAR, _LEAST_BAR + room - len(text)))
    done = round(bar * step / num_steps) if num_steps else 0
    return Text.assemble(
        ("step ", "bold"), ("━" * done, "bar.complete"), ("━" * (bar - done), "bar.back"), f" {count}  {text}"
    )


def fitted(parts: Mapping[str, str], width: int) -> str:
    """The most important of the parts that fit, in their places."""
    chosen: list[str] = []
    for name in _ORDER:
        if name in parts:
            wider = [*chosen, name]
            if len("  ".join(parts[each] for each in wider)) > width:
                break
            chosen = wider
    return "  ".join(parts[name] for name in _PLACES if name in chosen)


def shown_parts(record: Mapping[str, Any], seconds_left: float | None) -> dict[str, str]:
    """What of a record is shown, by name."""
    found = {
        "loss": f"loss {record['loss']:.4f}",
        "ppl": f"ppl {_short(perplexity(record['loss']))}",
        "lr": f"lr {record['lr']:.2e}",
        "tokens": f"{record['tokens_per_second']:,.0f} tokens/s",
    }
    if (norm := record.get("grad_norm")) is not None:
        found["grad"] = f"grad {norm:.3g}"
    if (mfu := record.get("mfu")) is not None:
        found["mfu"] = f"MFU {mfu:.0%}"
    if (memory := record.get("memory")) is not None:
        found["memory"] = f"{memory['now'] / 2**30:.1f} GiB"
    if seconds_left is not None:
        found["left"] = f"{duration(seconds_left)} left"
    return found


def duration(seconds: float) -> str:
    """``59s``, ``12m 03s``, ``3h 07m``, ``2d 04h``."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {whole % 60:02}s" if minutes else f"{whole}s"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"
