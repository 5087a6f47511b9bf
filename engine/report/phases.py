"""Names of our own in a profiler's trace; no cost where nothing is profiled."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

PREFIX = "narrowgauge::"


def named(name: str) -> AbstractContextManager[Any]:
    """What runs inside is called ``narrowgauge::NAME`` in the trace, where one is being taken."""
    # As torch's own code asks it.
    return record_function(f"{PREFIX}{name}") if torch.autograd._profiler_enabled() else nullcontext()  # pyright: ignore[reportPrivateImportUsage]
