"""Preallocated files that activations are written to, cut into extents.

A slab is never visible under a name: it is created without one (``O_TMPFILE``), or unlinked while open where the
filesystem cannot do that. So two runs on one path cannot meet, and a killed run leaves nothing behind. Its blocks are
reserved before the first write and its size changes only while no extent is in use.
"""

import errno
import os
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..errors import OffloadError, OffloadSpaceError
from .deaths import Deaths
from .filesystem import available_bytes
from .ranges import FreeRanges

ALIGNMENT = 4096


def round_up(nbytes: int) -> int:
    """To whole blocks of :data:`ALIGNMENT` bytes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Extent:
    """A range of a slab file, given back when the object dies: whoever writes or reads it holds a reference."""

    __slots__ = ("__weakref__", "_slab", "nbytes", "offset")

    def __init__(self, slab: "SlabFile", offset: int, nbytes: int) -> None:
        self._slab, self.offset, self.nbytes = slab, offset, nbytes

    @property
    def fd(self) -> int:
        return self._slab.fd

    @property
    def path(self) -> Path:
        """The folder the slab lies in."""
        return self._slab.folder

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.path} (byte {self.offset:,} of the slab)"


class SlabFile:
    """One nameless file, opened for direct I/O, and the list of its free ranges."""

    def __init__(self, folder: Path, capacity: int) -> None:
        """Reserve ``capacity`` bytes, a multiple of :data:`ALIGNMENT`, in ``folder``.

        Raises:
            OffloadSpaceError: there is less room.
            OffloadError: the folder does not exist or cannot be written to.
        """
        self.folder, self.capacity = folder, 0
        self._deaths = Deaths()
        self._free = FreeRanges(0)
        self.fd, self.is_direct = _open_nameless(folder)
        try:
            self.resize(capacity)
        except BaseException:
            self.close()
            raise

    def resize(self, capacity: int) -> None:
        """Reserve another number of bytes. Only while no extent is in use."""
        self._deaths.settle()
        assert self._free.nbytes == self.capacity
        missing = capacity - self.capacity
        # Not by its name: the folder may have been removed since.
        available = available_bytes(self.fd)
        if missing > available:
            raise OffloadSpaceError(f"{self.folder}: expected {missing:,} more bytes free, got {available:,}")
        try:
            os.ftruncate(self.fd, capacity)
            if capacity:
                os.posix_fallocate(self.fd, 0, capacity)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.fd, self.capacity)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OffloadSpaceError(
                    f"{self.folder}: cannot reserve {capacity:,} bytes: {error.strerror}"
                ) from error
            raise OffloadError(f"{self.folder}: cannot reserve {capacity:,} bytes: {error.strerror}") from error
        self.capacity = capacity
        self._free = FreeRanges(capacity)

    def allocate(self, nbytes: int) -> Extent | None:
        """A range of whole blocks; None if there is none that large."""
        self._deaths.settle()
        offset = self._free.take(nbytes)
        if offset is None:
            return None
        extent = Extent(self, offset, nbytes)
        self._deaths.watch(extent, partial(self._free.give, offset, nbytes))
        return extent

    def used(self) -> int:
        """Bytes in extents that are alive."""
        return self.capacity - sum(length for _, length in self.free_ranges())

    def free_ranges(self) -> list[tuple[int, int]]:
        """Offsets and lengths of what is free, in order; no two of them touch."""
        self._deaths.settle()
        return list(self._free.ranges)

    def close(self, *, in_use: bool = False) -> None:
        """Give the space back.

        Args:
            in_use: a thread is still in a transfer; the descriptor's number must not get to another file.
        """
        if self.fd >= 0:
            if in_use:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, self.fd, inheritable=False)
                os.close(null)
            else:
                os.close(self.fd)
            self.fd = -1


class SlabStore:
    """Slab files in one or several folders, used in turn."""

    def __init__(self, folders: Sequence[Path], capacity: int) -> None:
        """Reserve ``capacity`` bytes, shared equally by the folders.

        Raises:
            OffloadSpaceError, OffloadError: see :class:`SlabFile`; nothing stays reserved.
        """
        self._lock = threading.Lock()
        self._next = 0
        self.files: list[SlabFile] = []
        try:
            for folder in folders:
                self.files.append(SlabFile(folder, round_up(-(-capacity // len(folders)))))
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> int:
        return sum(file.capacity for file in self.files)

    def used(self) -> int:
        """Bytes in extents that are alive."""
        return sum(self.used_by_file())

    def used_by_file(self) -> list[int]:
        """The same for each of the files."""
        with self._lock:
            return [file.used() for file in self.files]

    def allocate(self, nbytes: int) -> Extent | None:
        """An extent of at least ``nbytes`` on the next file that has room; None if all are full."""
        with self._lock:
            for _ in self.files:
                file = self.files[self._next]
                self._next = (self._next + 1) % len(self.files)
                extent = file.allocate(round_up(nbytes))
                if extent is not None:
                    return extent
        return None

    def resize_unused(self, capacity: int) -> bool:
        """Reserve another number of bytes in all, if no extent is in use; returns whether it was done.

        Raises:
            OffloadSpaceError: there is less room; the old reservation stays.
        """
        share = round_up(-(-capacity // len(self.files)))
        with self._lock:
            if any(file.used() for file in self.files):
                return False
            before = self.files[0].capacity
            try:
                for file in self.files:
                    file.resize(share)
            except BaseException:
                for file in self.files:
                    if file.capacity > before:
                        file.resize(before)
                raise
        return True

    def close(self, *, in_use: bool = False) -> None:
        """See :meth:`SlabFile.close`."""
        for file in self.files:
            file.close(in_use=in_use)


def _open_nameless(folder: Path) -> tuple[int, bool]:
    """A descriptor of a new file without a name, and whether it bypasses the page cache."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        for flags in (direct, 0):
            try:
                return os.open(folder, os.O_RDWR | os.O_TMPFILE | flags, 0o600), bool(flags)
            except OSError as error:
                # EINVAL: no O_DIRECT here. The others: no O_TMPFILE.
                if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT) and folder.is_dir():
                    return _open_unlinked(folder, direct)
                if error.errno != errno.EINVAL:
                    raise
        return _open_unlinked(folder, direct)
    except OSError as error:
        raise OffloadError(f"{folder}: cannot write there: {error.strerror}") from error


def _open_unlinked(folder: Path, direct: int) -> tuple[int, bool]:
    descriptor, name = tempfile.mkstemp(prefix=".narrowgauge-", dir=folder)
    os.close(descriptor)
    try:
        try:
            return os.open(name, os.O_RDWR | direct), bool(direct)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.open(name, os.O_RDWR), False
    finally:
        os.unlink(name)
