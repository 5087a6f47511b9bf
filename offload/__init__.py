"""Keeping what forward saves for backward on NVMe."""

from .activation_offload import ActivationOffload
from .debug_state import DebugState
from .errors import OffloadCorruptionError, OffloadError, OffloadIOError, OffloadSpaceError
from .options import OffloadOptions
from .schedule import MicroBatch, Schedule
from .stats import OffloadStats

__all__ = [
    "ActivationOffload",
    "DebugState",
    "MicroBatch",
    "OffloadCorruptionError",
    "OffloadError",
    "OffloadIOError",
    "OffloadOptions",
    "OffloadSpaceError",
    "OffloadStats",
    "Schedule",
]
