"""Text documents: files the user names, or the source files of the running Python's standard library."""

import glob
import hashlib
import json
import os
import socket
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import DataError

# Longer documents are cut at a line's end: the unit that is tokenized, and that is held out for validation.
_PIECE_CHARS = 1 << 20
_DIGEST_CHARS = 64


def expand(patterns: Sequence[str], key: str) -> list[Path]:
    """The files that paths and globs name, in a fixed order.

    Args:
        key: the configuration key, for messages.

    Raises:
        DataError: a path or glob names no file.
    """
    files: list[Path] = []
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        matches = sorted(path for name in glob.glob(expanded, recursive=True) if (path := Path(name)).is_file())
        if not matches and is_token_prefix(Path(expanded)):
            matches = [Path(expanded)]
        if not matches:
            raise DataError(f"{key}: {pattern!r} names no file")
        files += [path for path in matches if path not in files]
    return files


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
    """A hash of what the files hold. A file's own hash is kept in the cache while its size and time do not change."""
    total = hashlib.sha256()
    folder = cache_dir / "hashes"
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        stat = path.stat()
        identity = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        known = folder / hashlib.sha256(identity.encode()).hexdigest()
        digest = known.read_text() if known.is_file() else ""
        if len(digest) != _DIGEST_CHARS:
            digest = _digest(path)
            # Other process ranks read while this one writes.
            aside = known.with_suffix(f".tmp-{socket.gethostname()}-{os.getpid()}")
            aside.write_text(digest)
            aside.replace(known)
        total.update(f"{path.name}\n{digest}\n".encode())
    return total.hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_pieces(files: Iterable[Path], *, skip_undecodable: bool) -> Iterator[tuple[str, bool]]:
    """The text of the files in pieces of whole lines; with each, whether it ends its document.

    Raises:
        DataError: a file is not UTF-8, unless ``skip_undecodable``.
    """
    for path in files:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                piece = "".join(file.readlines(_PIECE_CHARS))
                while piece:
                    following = "".join(file.readlines(_PIECE_CHARS))
                    yield piece, not following
                    piece = following
        except UnicodeDecodeError as error:
            if not skip_undecodable:
                raise DataError(f"{path}: not UTF-8 text: {error}") from error
