"""What a user sees while a run goes: a line that changes on a terminal, lines elsewhere."""

import io
import math
from typing import Any

import pytest
from rich.console import Console

from narrowgauge.engine.report.progress import ProgressView, duration, progress_line, shown_parts

RECORD: dict[str, Any] = {
    "loss": 3.2145,
    "lr": 2e-3,
    "grad_norm": 0.8312,
    "tokens_per_second": 123456.7,
    "mfu": 0.413,
    "memory": {"now": 61 * 2**30, "peak": 70 * 2**30},
}


def show(*, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=160)
    with ProgressView(console, first_step=2, num_steps=5) as view:
        view.say("step 2: validation loss 7.0000")
        for step in (3, 4, 5):
            view.update(step, {**RECORD, "loss": 6.5 - step, "tokens_per_second": 1234.4})
    return output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_everything_is_shown_where_there_is_room(terminal: bool) -> None:
    text = show(terminal=terminal)
    assert "validation loss 7.0000" in text
    expected = "loss 1.5000  ppl 4.5  grad 0.831  lr 2.00e-03  1,234 tokens/s  MFU 41%  61.0 GiB  0s left"
    assert expected in text
    assert "5/5" in text
    assert ("━" in text) == terminal
    assert ("\x1b[" in text) == terminal


def test_without_a_terminal_only_the_first_and_last_of_quick_steps_have_lines() -> None:
    lines = show(terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["step 3/5", "step 5/5"]
    assert lines[-1].endswith("0s left")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_the_line_is_never_wider_than_the_terminal(width: int) -> None:
    """At 80 columns it broke into two, of which rich drew the first again and again."""
    line = progress_line(8120, 10000, shown_parts(RECORD, 4521), width).plain
    assert len(line) <= width
    assert line.startswith("step ━━━━━━━━━━")
    assert "8120/10000  loss 3.2145" in line
    if width == 80:
        assert line.endswith("8120/10000  loss 3.2145  123,457 tokens/s  MFU 41%  1h 15m left")
    if width == 140:
        assert "ppl 24.9  grad 0.831  lr 2.00e-03  123,457 tokens/s  MFU 41%  61.0 GiB  1h 15m left" in line


def test_what_is_not_known_has_no_column() -> None:
    parts = shown_parts({"loss": 800.0, "lr": 1e-3, "tokens_per_second": 5.0, "grad_norm": None}, None)
    assert parts == {"loss": "loss 800.0000", "ppl": f"ppl {math.inf:.1e}", "lr": "lr 1.00e-03", "tokens": "5 tokens/s"}


def test_durations() -> None:
    assert [duration(each) for each in (0.4, 59, 723, 11220, 187200)] == ["0s", "59s", "12m 03s", "3h 07m", "2d 04h"]
