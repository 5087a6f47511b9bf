"""How much disk one process rank reserves."""

import os
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..errors import OffloadSpaceError
from .filesystem import available_bytes
from .slab import SlabStore, round_up

LEAST_CAPACITY = 64 << 20
_ATTEMPTS = 20


def reserve(folders: Sequence[Path], capacity_bytes: int | None) -> SlabStore:
    """A slab of that many bytes, or of this process rank's half of what is free.

    Raises:
        OffloadSpaceError: there is less room.
        OffloadError: a folder cannot be written to.
    """
    if capacity_bytes is not None:
        return SlabStore(folders, capacity_bytes)
    for _ in range(_ATTEMPTS - 1):
        try:
            return SlabStore(folders, _default_capacity(folders))
        except OffloadSpaceError:
            # Somebody else has taken his half since this process asked what is free.
            time.sleep(random.uniform(0.0, 0.2))
    return SlabStore(folders, _default_capacity(folders))


def warn_of_page_cache(store: SlabStore) -> None:
    """Say so where a filesystem cannot do without it."""
    for file in store.files:
        if not file.is_direct:
            warnings.warn(
                f"{file.folder}: this filesystem has no direct I/O; activations will pass through the page cache and"
                " take its memory",
                stacklevel=4,
            )


def _default_capacity(folders: Sequence[Path]) -> int:
    ranks = local_process_ranks()
    smallest = min(map(available_bytes, folders))
    capacity = smallest * len(folders) // (2 * ranks)
    if capacity < LEAST_CAPACITY:
        raise OffloadSpaceError(
            f"{folders[0]}: expected at least {2 * ranks * LEAST_CAPACITY:,} bytes free, got {smallest:,}"
        )
    return round_up(capacity)


def local_process_ranks() -> int:
    """Process ranks on this machine, as torchrun or another launcher says."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if name in os.environ:
            return max(1, int(os.environ[name]))
    return 1
