"""What stages share: a model alone on the GPU, its peak memory, and rows for the tables."""

import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.compare import Phases, ratios

MIB = 1 << 20


def rows(phases: dict[str, Phases], baseline: str) -> dict[str, dict[str, Any]]:
    """For each alternative its times: per phase the median in ms, and the ratio to the baseline as [median, lower
    quartile, upper quartile].
    """
    return {
        name: {
            key: value
            for phase, figures in own.items()
            for key, value in (
                (f"{phase} ms", 1e3 * figures["seconds_median"]),
                (f"{phase} ratio", [figures["ratio"], *figures["ratio_quartiles"]]),
            )
        }
        for name, own in ratios(phases, baseline).items()
    }


def allocated() -> int | None:
    """Bytes of tensors on the GPU now, after what is garbage was freed; None without a GPU."""
    gc.collect()
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def peak_of(step: Callable[[], None]) -> dict[str, float | None]:
    """Do a step, and say how much memory tensors took at most meanwhile, and how much the allocator had for them.

    Both count everything that is on the GPU.
    """
    if not torch.cuda.is_available():
        step()
        return {"peak MiB": None, "reserved MiB": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {
        "peak MiB": torch.cuda.max_memory_allocated() / MIB,
        "reserved MiB": torch.cuda.max_memory_reserved() / MIB,
    }
