"""The live view of a run on process rank 0: a bar on a terminal, plain lines elsewhere."""

import time
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressView:
    """Shows step, loss, learning rate, tokens per second and the time left."""

    def __init__(self, console: Console, *, first_step: int, num_steps: int) -> None:
        self._console, self._num_steps, self._first_step = console, num_steps, first_step
        self._bar: Progress | None = None
        self._started = self._last_line = time.monotonic()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]step"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=num_steps, completed=first_step)

    def __enter__(self) -> "ProgressView":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss: float, lr: float, tokens_per_second: float) -> None:
        text = f"loss {loss:.4f}  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if step == self._first_step + 1:
            self._started = now
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or step in (self._first_step + 1, self._num_steps):
            self._last_line = now
            timed = step - self._first_step - 1
            left = f"  {(now - self._started) / timed * (self._num_steps - step):,.0f} s left" if timed else ""
            with suppress(OSError):
                # Whoever read it may be gone, and the run goes on to save.
                self._console.print(f"step {step}/{self._num_steps}  {text}{left}", highlight=False)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with suppress(OSError):
            (self._bar.console if self._bar is not None else self._console).print(text, highlight=False)
