"""Text documents: files the user names, or the source files of the running Python's standard library."""

import glob
import hashlib
import json
import os
import re
import socket
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import xxhash

from ..errors import DataError
from ..files import local_path

# Longer documents are cut at a line's end, longer lines at a space: the unit that is tokenized.
_PIECE_CHARS = 1 << 20
_WORD_CHARS = 4096
_LAST_SPACE = re.compile(r"\s(?=\S*$)")
_CHUNK = 1 << 20


def expand(patterns: Sequence[str], key: str) -> list[Path]:
    """The files that paths and globs name, in a fixed order.

    Args:
        key: the configuration key, for messages.

    Raises:
        DataError: a path or glob names no file.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = local_path(pattern, key)
        matches = [path] if path.is_file() else _matches(str(path)) or _matches(str(path).replace("[", "[[]"))
        if not matches and is_token_prefix(path):
            matches = [path]
        if not matches:
            hint = f"; it is a folder, name files in it, such as '{pattern}/**/*.txt'" if path.is_dir() else ""
            raise DataError(f"{key}: {pattern!r} names no file{hint}")
        files += matches
    return list(dict.fromkeys(files))


def _matches(pattern: str) -> list[Path]:
    return sorted(path for name in glob.glob(pattern, recursive=True) if (path := Path(name)).is_file())


def is_token_prefix(path: Path) -> bool:
    """Whether ``path`` belongs to a ``.bin``/``.idx`` pair, by either file or by the common prefix."""
    return path.suffix in (".bin", ".idx") or Path(f"{path}.bin").is_file() or Path(f"{path}.idx").is_file()


def token_prefix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def stdlib_files() -> list[Path]:
    """The source files of the standard library of the Python that runs."""
    root = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    files = sorted(path for path in root.rglob("*.py") if not foreign & set(path.relative_to(root).parts))
    if not files:
        raise DataError(f"data.train: 'stdlib' needs the standard library's source files, {root} has none")
    return files


def content_hash(files: Iterable[Path], cache_dir: Path) -> str:
    """A hash of what the files hold. A file's own hash is kept in the cache while the file has not been touched."""
    total = hashlib.sha256()
    folder = cache_dir / "hashes"
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        stat = path.stat()
        # The time of change cannot be set back, as that of modification is by tools that copy.
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        identity = json.dumps([str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, *times])
        known = folder / hashlib.sha256(identity.encode()).hexdigest()
        digest = _kept(known)
        if digest is None:
            digest = _digest(path)
            # Other process ranks read while this one writes.
            aside = known.with_suffix(f".tmp-{socket.gethostname()}-{os.getpid()}")
            aside.write_text(f"{digest} {_check_digits(known, digest)}")
            aside.replace(known)
        total.update(f"{path.name}\n{digest}\n".encode())
    return total.hexdigest()


def _kept(known: Path) -> str | None:
    """The hash that is kept in a file; None where there is none, or it is not whole."""
    try:
        digest, check = known.read_text().split()
    except (OSError, ValueError):
        return None
    return digest if check == _check_digits(known, digest) else None


def _check_digits(known: Path, digest: str) -> str:
    return xxhash.xxh3_64_hexdigest(f"{known.name} {digest}".encode())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_pieces(files: Iterable[Path], *, skip_undecodable: bool) -> Iterator[tuple[str, bool]]:
    """The text of the files in pieces of whole lines; with each, whether it ends its document.

    A line that is longer than a piece is cut after a space, or where the piece is full.

    Raises:
        DataError: a file is not UTF-8, unless ``skip_undecodable``: then it is left out.
    """
    for path in files:
        try:
            if skip_undecodable:
                path.read_bytes().decode()
            yield from _pieces_of(path)
        except UnicodeDecodeError as error:
            if not skip_undecodable:
                raise DataError(f"{path}: not UTF-8 text: {error}") from error


def _pieces_of(path: Path) -> Iterator[tuple[str, bool]]:
    rest = ""
    with path.open(encoding="utf-8", newline="") as file:
        piece, rest = _next_piece(file, rest)
        while piece:
            following, rest = _next_piece(file, rest)
            yield piece, not following
            piece = following


def _next_piece(file: TextIO, begin: str) -> tuple[str, str]:
    """The next piece, and what was read of its last line beyond it."""
    parts, length, line = [begin], len(begin), ""
    while length < _PIECE_CHARS and (line := file.readline(_PIECE_CHARS)):
        parts.append(line)
        length += len(line)
    text = "".join(parts)
    if len(line) < _PIECE_CHARS or line.endswith(("\n", "\r")):
        return text, ""
    space = _LAST_SPACE.search(text, len(text) - _WORD_CHARS)
    return (text[: space.end()], text[space.end() :]) if space else (text, "")
