"""Keeping what forward saves for backward on NVMe."""

from .activation_offload import ActivationOffload
from .errors import OffloadCorruptionError, OffloadError, OffloadIOError, OffloadSpaceError
from .stats import OffloadStats

__all__ = [
    "ActivationOffload",
    "OffloadCorruptionError",
    "OffloadError",
    "OffloadIOError",
    "OffloadSpaceError",
    "OffloadStats",
]
