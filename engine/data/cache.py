"""What is built once and kept: folders under a key of what they are made from, with digests of their files.

Whatever is built is built by one process of the machine, aside, and renamed into place; the others wait for the lock
and find it. Nothing here needs a process group.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import xxhash

from .vouched import one_rank_at_a_time, vouch, whole_once

logger = logging.getLogger(__name__)

FORMAT = 2
_DIGESTS = "digests.json"
_CHUNK = 4 << 20


def cache_key(*parts: object, version: int = FORMAT) -> str:
    """A name for what is made from ``parts`` by the code of that version."""
    return hashlib.sha256(json.dumps([version, *parts]).encode()).hexdigest()[:32]


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Have one process of this machine build the folder ``target``; return it once it is there, whole.

    What is already there is used only if its files still have the digests they were written with, which one process
    rank of each host compares. Otherwise it is built anew; processes that have the old files open keep them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with one_rank_at_a_time(target), Path(f"{target}.lock").open("a+") as lock:
        # Shared: hosts read the files at the same time.
        fcntl.flock(lock, fcntl.LOCK_SH)
        if whole_once(target, lambda: damage_of(target) is None):
            return target
        fcntl.flock(lock, fcntl.LOCK_UN)
        fcntl.flock(lock, fcntl.LOCK_EX)
        damage = damage_of(target)
        if damage is not None:
            _build_anew(target, build, damage)
        vouch(target)
    return target


def _build_anew(target: Path, build: Callable[[Path], None], damage: str) -> None:
    if target.exists():
        logger.warning(f"{target}: damaged ({damage}); it is built anew")
        shutil.rmtree(target)
    # Containers have the same few process ids; what one left that was ended in the middle is in the way.
    aside = Path(f"{target}.tmp-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        build(aside)
        _write_digests(aside)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def damage_of(folder: Path) -> str | None:
    """What differs from what was written; None if nothing does."""
    try:
        expected = json.loads((folder / _DIGESTS).read_text())
        found = _digests(folder)
    except (OSError, ValueError) as error:
        return f"its digests cannot be compared: {error}"
    if not isinstance(expected, dict):
        return f"{_DIGESTS} holds no digests"
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"changed since it was written: {', '.join(differing)}" if differing else None


def digest_of(path: Path) -> str:
    """A fast hash of a file, against damage and not against forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / _DIGESTS)
    return {str(path.relative_to(folder)): digest_of(path) for path in files}


def _write_digests(folder: Path) -> None:
    (folder / _DIGESTS).write_text(json.dumps(_digests(folder), indent=2, sort_keys=True) + "\n")
