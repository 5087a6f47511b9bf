"""What activation offload did in a step, and in a run."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from narrowgauge.offload import ActivationOffload

BUDGET = "offload_budget"
ENCODED = ("encoded_from", "encoded_to")
BYTES = ("saved_activations_peak", "saved_activations_peak_resident", "offload_written", "offload_read")


class OffloadMeter:
    """Reads an offload's counters step by step; all empty where there is none."""

    def __init__(self, offload: ActivationOffload | None) -> None:
        self._offload = offload
        self._before = offload.stats() if offload is not None else None

    def step(self) -> tuple[dict[str, int], dict[str, float]]:
        """Bytes and seconds since the last call, of this process rank.

        :data:`BUDGET`, the bytes that a forward may write, is among them where each forward of the step had a plan.
        """
        if self._offload is None or self._before is None:
            return {}, {}
        before, now = self._before, self._offload.stats()
        self._before = now
        self._offload.reset_peaks()
        values = (now.saved_peak, now.resident_peak, now.written - before.written, now.read - before.read)
        moved: dict[str, int] = dict(zip(BYTES, values, strict=True))
        if self._offload.codec != "none":
            moved |= {key: getattr(now, key) - getattr(before, key) for key in ENCODED}
        if now.offload_budget is not None and now.unplanned == before.unplanned:
            moved[BUDGET] = now.offload_budget
        return moved, {"io_stall": now.io_stall - before.io_stall}


def summarize_offload(records: Sequence[dict[str, Any]], offload: ActivationOffload | None) -> dict[str, Any]:
    """The ``bytes``, ``seconds`` and ``offload`` entries of a summary; empty where nothing was offloaded.

    Peaks are the highest of the steps under a plan: the first one, of which the plan is made, writes everything and
    keeps it until it is written. ``saved_activations_resident_median`` is the median step's of them: a single step in
    which the disk was busy makes the highest. Written, read and waited are per step.
    """
    found = [record for record in records if BYTES[0] in record["bytes"]]
    if offload is None or not found:
        return {"bytes": {}, "seconds": {}}
    planned = [record for record in found if BUDGET in record["bytes"]] or found
    stats = offload.stats()
    return {
        "bytes": {
            key: max(record["bytes"][key] for record in planned)
            if "peak" in key
            else round(fmean(record["bytes"][key] for record in found))
            for key in (*BYTES, *(ENCODED if offload.codec != "none" else ()))
        }
        | {"saved_activations_resident_median": round(median(record["bytes"][BYTES[1]] for record in planned))},
        "seconds": {"io_stall": median(record["seconds"]["io_stall"] for record in found)},
        "activation_offload": {"codec": offload.codec}
        | {
            key: getattr(stats, key)
            for key in (
                "backend",
                "write_bandwidth",
                "read_bandwidth",
                "written_per_day",
                "drive_writes_per_day",
                "drive_life_years",
            )
        },
    }
