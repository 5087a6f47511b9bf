"""Slab files: their extents, their room, and that nothing of them is seen or left."""

import errno
import gc
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from narrowgauge.offload import OffloadError, OffloadSpaceError
from narrowgauge.offload.storage import reservation
from narrowgauge.offload.storage import slab as slab_module
from narrowgauge.offload.storage.filesystem import available_bytes
from narrowgauge.offload.storage.reservation import reserve
from narrowgauge.offload.storage.slab import ALIGNMENT, Extent, SlabFile, SlabStore, round_up
from tests.offload.faults import open_descriptors

MiB = 1 << 20
NAMELESS = pytest.mark.parametrize("nameless", [True, False], ids=["O_TMPFILE", "unlinked"])


@pytest.fixture
def without_tmpfile(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Calling it with an errno lets the filesystem refuse O_TMPFILE with it."""
    real = os.open

    def refuse_with(number: int) -> None:
        def refusing(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(number, os.strerror(number))
            return real(path, flags, mode, **options)

        monkeypatch.setattr(slab_module.os, "open", refusing)

    return refuse_with


def assert_consistent(slab: SlabFile, alive: list[Extent]) -> None:
    """Extents and free ranges cover the slab once, in whole blocks, and no two free ranges touch."""
    assert slab.used() == sum(extent.nbytes for extent in alive)
    free = slab.free_ranges()
    ranges = sorted([(extent.offset, extent.nbytes) for extent in alive] + free)
    end = 0
    for offset, nbytes in ranges:
        assert offset == end
        assert nbytes > 0
        assert offset % ALIGNMENT == nbytes % ALIGNMENT == 0
        end = offset + nbytes
    assert end == slab.capacity
    assert free == sorted(free)
    assert all(sum(one) < other[0] for one, other in pairwise(free))


@pytest.mark.parametrize("seed", range(5))
def test_extents_never_overlap(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    slab = SlabFile(tmp_path, MiB)
    alive: list[Extent] = []
    refused = 0
    for _ in range(1500):
        if alive and dice.random() < 0.5:
            alive.pop(dice.randrange(len(alive)))
        else:
            extent = slab.allocate(round_up(dice.choice([1, 5000, 40_000, 200_000])))
            if extent is None:
                refused += 1
            else:
                alive.append(extent)
            del extent
        assert_consistent(slab, alive)
    assert refused
    alive.clear()
    assert slab.used() == 0
    assert slab.free_ranges() == [(0, MiB)]
    slab.close()


def test_free_neighbours_become_one(tmp_path: Path) -> None:
    slab = SlabFile(tmp_path, 4 * ALIGNMENT)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [1, 3, 0, 2]):
        extents = {place: slab.allocate(ALIGNMENT) for place in range(4)}
        assert slab.allocate(ALIGNMENT) is None
        for place in order:
            assert extents.pop(place) is not None
        whole = slab.allocate(4 * ALIGNMENT)
        assert whole is not None
        assert whole.offset == 0
        del whole
    slab.close()


@pytest.mark.parametrize("folders", [1, 2, 3])
def test_store_keeps_to_its_capacity(tmp_path: Path, folders: int) -> None:
    paths = [tmp_path / str(number) for number in range(folders)]
    for path in paths:
        path.mkdir()
    store = SlabStore(paths, 10 * ALIGNMENT)
    assert 10 * ALIGNMENT <= store.capacity < (10 + folders) * ALIGNMENT
    extents: list[Extent] = []
    while (extent := store.allocate(100)) is not None:
        extents.append(extent)
    assert len(extents) * ALIGNMENT == store.used() == store.capacity
    assert len({(extent.path, extent.offset) for extent in extents}) == len(extents)
    # In turn, so that every disk works.
    assert [extent.path for extent in extents[:folders]] == paths
    assert store.allocate(1) is None
    extents.pop()
    assert store.allocate(ALIGNMENT + 1) is None
    again = store.allocate(1)
    assert again is not None
    store.close()


def test_tensor_larger_than_any_range(tmp_path: Path) -> None:
    store = SlabStore([tmp_path], 4 * ALIGNMENT)
    assert store.allocate(5 * ALIGNMENT) is None
    extents = [store.allocate(1) for _ in range(4)]
    del extents[1], extents[2]
    # Two blocks are free, but not side by side.
    assert store.used() == 2 * ALIGNMENT
    assert store.allocate(2 * ALIGNMENT) is None
    store.close()


def test_resize_only_while_unused(tmp_path: Path) -> None:
    store = SlabStore([tmp_path], MiB)
    extent = store.allocate(1)
    assert not store.resize_unused(2 * MiB)
    assert store.capacity == MiB
    del extent
    for capacity in (2 * MiB, ALIGNMENT, 3 * MiB):
        assert store.resize_unused(capacity)
        status = os.fstat(store.files[0].fd)
        assert store.capacity == status.st_size == capacity
        assert status.st_blocks * 512 >= capacity
        whole = store.allocate(capacity)
        assert whole is not None
        del whole
    store.close()


def test_resize_beyond_the_disk_changes_nothing(tmp_path: Path) -> None:
    store = SlabStore([tmp_path], MiB)
    with pytest.raises(OffloadSpaceError, match=str(tmp_path)):
        store.resize_unused(available_bytes(tmp_path) * 2)
    assert store.capacity == os.fstat(store.files[0].fd).st_size == MiB
    whole = store.allocate(MiB)
    assert whole is not None
    store.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_refused_reservation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Room that was there a moment ago, a quota, a broken disk."""
    descriptors = open_descriptors()

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(slab_module.os, "posix_fallocate", refuse)
    with pytest.raises(OffloadError, match=f"{tmp_path}: cannot reserve 1,048,576 bytes") as caught:
        SlabStore([tmp_path], MiB)
    assert isinstance(caught.value, OffloadSpaceError) is (number != errno.EIO)
    del caught
    assert open_descriptors() == descriptors


@NAMELESS
def test_two_slabs_in_one_folder_are_two_files(
    tmp_path: Path, without_tmpfile: Callable[[int], None], nameless: bool
) -> None:
    if not nameless:
        without_tmpfile(errno.EOPNOTSUPP)
    first, second = SlabFile(tmp_path, MiB), SlabFile(tmp_path, MiB)
    assert os.fstat(first.fd).st_ino != os.fstat(second.fd).st_ino
    for slab, letter in ((first, b"1"), (second, b"2")):
        plain = os.open(f"/proc/self/fd/{slab.fd}", os.O_RDWR)
        os.pwrite(plain, letter * 10, 0)
        os.close(plain)
    for slab, letter in ((first, b"1"), (second, b"2")):
        plain = os.open(f"/proc/self/fd/{slab.fd}", os.O_RDONLY)
        assert os.pread(plain, 10, 0) == letter * 10
        os.close(plain)
    first.close()
    second.close()


@NAMELESS
def test_slab_has_no_name(tmp_path: Path, without_tmpfile: Callable[[int], None], nameless: bool) -> None:
    if not nameless:
        without_tmpfile(errno.EOPNOTSUPP)
    slab = SlabFile(tmp_path, MiB)
    assert os.listdir(tmp_path) == []
    status = os.fstat(slab.fd)
    assert status.st_nlink == 0
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == MiB
    assert status.st_blocks * 512 >= MiB
    assert not os.get_inheritable(slab.fd)
    slab.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL])
def test_filesystem_without_nameless_files(tmp_path: Path, without_tmpfile: Callable[[int], None], number: int) -> None:
    """NFS, FUSE, old kernels: each says it in another way."""
    descriptors = open_descriptors()
    without_tmpfile(number)
    slab = SlabFile(tmp_path, MiB)
    assert slab.is_direct
    assert os.listdir(tmp_path) == []
    slab.close()
    assert open_descriptors() == descriptors


@NAMELESS
def test_filesystem_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool) -> None:
    real, descriptors = os.open, open_descriptors()

    def refusing(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O")
        if not nameless and flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no nameless files")
        return real(path, flags, mode, **options)

    monkeypatch.setattr(slab_module.os, "open", refusing)
    slab = SlabFile(tmp_path, MiB)
    assert not slab.is_direct
    assert os.listdir(tmp_path) == []
    slab.close()
    assert open_descriptors() == descriptors


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EROFS, errno.EIO])
def test_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """By its name, after it was made: neither the name nor a descriptor stays."""
    real, descriptors = os.open, open_descriptors()

    def refusing(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no nameless files")
        if not flags & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, mode, **options)

    monkeypatch.setattr(slab_module.os, "open", refusing)
    with pytest.raises(OffloadError, match=f"{tmp_path}: cannot write there: {os.strerror(number)}"):
        SlabFile(tmp_path, MiB)
    monkeypatch.undo()
    assert open_descriptors() == descriptors
    assert os.listdir(tmp_path) == []


@NAMELESS
def test_descriptors_are_closed_on_failure(
    tmp_path: Path, without_tmpfile: Callable[[int], None], nameless: bool
) -> None:
    if not nameless:
        without_tmpfile(errno.EOPNOTSUPP)
    descriptors, free = open_descriptors(), available_bytes(tmp_path)
    good = tmp_path / "good"
    good.mkdir()
    for folder, needed in ((tmp_path / "missing", MiB), (tmp_path, 4 * free)):
        with pytest.raises(OffloadError, match=str(folder)):
            SlabStore([good, folder], needed)
        with pytest.raises(OffloadError, match=str(folder)):
            SlabFile(folder, needed)
    gc.collect()
    assert open_descriptors() == descriptors
    assert os.listdir(tmp_path) == ["good"]
    assert os.listdir(good) == []


def test_close_gives_the_space_back(tmp_path: Path) -> None:
    descriptors = open_descriptors()
    store = SlabStore([tmp_path, tmp_path], 2 * MiB)
    extent = store.allocate(1)
    store.close()
    store.close()
    assert open_descriptors() == descriptors
    # An extent that outlives its slab is no more than a leftover.
    assert extent is not None
    del extent


def test_capacity_is_rounded_up(tmp_path: Path) -> None:
    store = SlabStore([tmp_path], 1)
    assert store.capacity == ALIGNMENT
    extent = store.allocate(1)
    assert extent is not None
    assert extent.nbytes == ALIGNMENT
    store.close()


def test_who_reserves_what_others_take_at_the_same_time_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each took half of what had been free before the others took theirs: one of two ranks failed, now and then."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    count = 3
    barrier, asked = threading.Barrier(count), set[int]()

    def ask_together(folder: Path) -> int:
        found = available_bytes(folder)
        if threading.get_ident() not in asked:
            asked.add(threading.get_ident())
            barrier.wait()
        return found

    def reserve_and_close(_: int) -> int:
        store = reserve([tmp_path], None)
        # The others come by what is left, or later by this.
        time.sleep(0.2)
        store.close()
        return sum(file.capacity for file in store.files)

    monkeypatch.setattr(reservation, "available_bytes", ask_together)
    with ThreadPoolExecutor(count) as pool:
        assert all(pool.map(reserve_and_close, range(count)))
