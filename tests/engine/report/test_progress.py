"""What a user sees while a run goes: a bar on a terminal, lines elsewhere."""

import io

import pytest
from rich.console import Console

from narrowgauge.engine.report.progress import ProgressView


def show(*, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=160)
    with ProgressView(console, first_step=2, num_steps=5) as view:
        view.say("step 2: validation loss 7.0000")
        for step in (3, 4, 5):
            view.update(step, loss=6.5 - step, lr=2e-3, tokens_per_second=1234.4)
    return output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_loss_rate_speed_and_place_are_shown(terminal: bool) -> None:
    text = show(terminal=terminal)
    assert "validation loss 7.0000" in text
    assert "loss 1.5000  lr 2.00e-03  1,234 tokens/s" in text
    assert "5/5" in text
    assert ("━" in text) == terminal
    assert ("\x1b[" in text) == terminal


def test_without_a_terminal_only_the_first_and_last_of_quick_steps_have_lines() -> None:
    lines = show(terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["step 3/5", "step 5/5"]
    assert lines[-1].endswith("0 s left")
