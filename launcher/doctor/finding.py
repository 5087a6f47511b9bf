"""What ``narrowgauge doctor`` says: one line for each thing it looked at."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: ``warning`` where a run works but slower or with less, ``error`` where it fails.
        cure: what to type, or to do; None where all is well.
    """

    status: Literal["ok", "warning", "error"]
    subject: str
    found: str
    cure: str | None = None


def gibibytes(nbytes: float) -> str:
    return f"{nbytes / (1 << 30):,.1f} GiB"


def first_line(error: BaseException | str) -> str:
    """An error in one line; libraries add traces of their own."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else "no reason given"
    return text if isinstance(error, str) else f"{type(error).__name__}: {text}"
