"""Commands as a user can read and type them."""

import shlex
from collections.abc import Sequence

from rich.console import Console

from narrowgauge.engine.config.launch_block import LaunchBlock
from narrowgauge.engine.config.redaction import HIDDEN, redact, redact_text


def show_command(
    console: Console, host: str | None, block: LaunchBlock, environment: dict[str, str], command: Sequence[str]
) -> None:
    """Print a command with its environment, but for the values of the user's own variables and of secrets."""
    shown = {key: HIDDEN if key in block.environment else shlex.quote(value) for key, value in environment.items()}
    words = [_without_secret(word) if before == "--set" else word for before, word in zip(["", *command], command)]  # noqa: B905
    text = redact_text(" ".join([*(f"{key}={value}" for key, value in shown.items()), shlex.join(words)]))
    console.print(f"{host}: {text}" if host is not None else text, highlight=False, markup=False, soft_wrap=True)


def _without_secret(override: str) -> str:
    path, _, value = override.partition("=")
    return f"{path}={redact(value, tuple(path.split('.')))}"
