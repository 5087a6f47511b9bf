"""From ``data`` in the configuration to packed samples, through a cache keyed by content.

Whatever is built (a tokenizer, token files) is built by one process of the machine, aside, and renamed into place;
the others wait for the lock and find it. Nothing here needs a process group.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config.run_blocks import DataBlock
from ..errors import DataError
from .corpus import content_hash, expand, is_token_prefix, read_pieces, stdlib_files, token_prefix
from .tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer, wrap_sentencepiece
from .tokens import TokenFile, write_tokens

_FORMAT = 1
_BATCH_PIECES = 64
Streams = list[tuple[Path, npt.NDArray[Any]]]


@dataclass(frozen=True)
class PreparedData:
    """Token streams for training and validation.

    Attributes:
        tokenizer: its folder, or None for token files without one.
        vocab_size: of the tokenizer; None without one.
        fingerprint: changes when the tokens do.
    """

    train: Streams
    validation: Streams
    tokenizer: Path | None
    vocab_size: int | None
    fingerprint: str


def prepare_data(block: DataBlock, notify: Callable[[str], None] = lambda text: None) -> PreparedData:
    """Find the data, train the tokenizer and tokenize if that has not been done for this content.

    Args:
        block: the configuration's ``data``.
        notify: told what is being built, by the process that builds it.

    Raises:
        DataError: files are missing, empty, damaged or of mixed kinds, or the cache cannot be written.
    """
    cache = Path(block.cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir: {cache} cannot be made: {error}") from error
    files = stdlib_files() if block.train == "stdlib" else expand(block.train, "data.train")
    validation = expand(block.validation, "data.validation") if block.validation is not None else []
    kinds = {is_token_prefix(path) for path in files + validation}
    if kinds == {True, False}:
        raise DataError("data: token files (.bin/.idx) and text files are mixed; one kind is allowed")
    return (
        _prepare_tokens(block, cache, files, validation)
        if kinds == {True}
        else _prepare_text(block, cache, files, validation, notify)
    )


def _prepare_tokens(block: DataBlock, cache: Path, files: list[Path], validation: list[Path]) -> PreparedData:
    prefixes = list(dict.fromkeys(map(token_prefix, files)))
    held_out = list(dict.fromkeys(map(token_prefix, validation)))
    train: Streams = []
    valid: Streams = [(file.bin_path, file.tokens) for file in map(TokenFile, held_out)]
    for file in map(TokenFile, prefixes):
        end = len(file.tokens) if held_out else _last_documents(file, block.validation_fraction)
        train.append((file.bin_path, file.tokens[:end]))
        if not held_out:
            valid.append((file.bin_path, file.tokens[end:]))
    content = content_hash([Path(f"{p}{end}") for p in prefixes + held_out for end in (".idx", ".bin")], cache)
    folder = _own_tokenizer(block, cache) if block.tokenizer is not None else None
    vocab_size = len(load_tokenizer(folder)) if folder is not None else None
    fingerprint = _key("token files", content, block.validation_fraction, len(held_out))
    return PreparedData(train, valid, folder, vocab_size, fingerprint)


def _last_documents(file: TokenFile, fraction: float) -> int:
    """Where the last ``fraction`` of the tokens starts, at the document's bound before it unless that is far off."""
    wanted = len(file.tokens) * (1 - fraction)
    ends = file.document_ends
    position = int(np.searchsorted(ends, wanted, side="right"))
    bound = int(ends[position - 1]) if position else 0
    return bound if len(file.tokens) - bound <= 2 * fraction * len(file.tokens) else int(wanted)


def _prepare_text(
    block: DataBlock, cache: Path, files: list[Path], validation: list[Path], notify: Callable[[str], None]
) -> PreparedData:
    embedded = block.train == "stdlib"
    content = content_hash(files, cache) + content_hash(validation, cache)

    def pieces(paths: list[Path]) -> Iterator[tuple[str, bool]]:
        return read_pieces(paths, skip_undecodable=embedded)

    if next(pieces(files), None) is None:
        raise DataError(f"data.train: expected text, got {len(files)} empty files")
    if block.tokenizer is not None:
        folder = _own_tokenizer(block, cache)
    else:

        def learn(target: Path) -> None:
            notify(f"training a tokenizer of {block.vocab_size} pieces on {len(files)} text files")
            train_tokenizer(lambda: (text for text, _ in pieces(files)), block.vocab_size, target)

        folder = _build_once(cache / "tokenizers" / _key("sentencepiece-bpe", content, block.vocab_size), learn)
    held_out = None if validation else block.validation_fraction
    key = _key("tokens", content, tokenizer_hash(folder), held_out)

    def tokenize(target: Path) -> None:
        notify(f"tokenizing {len(files) + len(validation)} text files")
        tokenizer = load_tokenizer(folder)
        target.mkdir()
        choose = (
            (lambda text: False)
            if validation
            else _holdout((text for text, _ in pieces(files)), block.validation_fraction)
        )
        for name, source, chosen in (("train", files, False), ("validation", validation or files, not validation)):
            selected = (piece for piece in pieces(source) if choose(piece[0]) == chosen)
            if write_tokens(target / name, _encode(tokenizer, selected), len(tokenizer)) == 0:
                raise DataError(f"data.{name}: no text was left for it")

    tokens = _build_once(cache / "tokens" / key, tokenize)
    streams = {name: TokenFile(tokens / name) for name in ("train", "validation")}
    vocab_size = len(load_tokenizer(folder))
    return PreparedData(
        [(streams["train"].bin_path, streams["train"].tokens)],
        [(streams["validation"].bin_path, streams["validation"].tokens)],
        folder,
        vocab_size,
        key,
    )


def _own_tokenizer(block: DataBlock, cache: Path) -> Path:
    assert block.tokenizer is not None
    source = Path(block.tokenizer).expanduser()
    digest = tokenizer_hash(source)
    if source.is_dir():
        return source
    return _build_once(
        cache / "tokenizers" / _key("wrapped", digest), lambda target: wrap_sentencepiece(source, target)
    )


def _holdout(texts: Iterable[str], fraction: float) -> Callable[[str], bool]:
    """Choose pieces for validation by the hash of their text: about ``fraction`` of them, at least one, never all.

    Raises:
        DataError: there is only one piece.
    """
    ranks = sorted({hashlib.sha256(text.encode()).digest() for text in texts})
    if len(ranks) < 2:
        raise DataError("data.validation: the text has a single piece, nothing can be held out; name files for it")
    last = ranks[min(max(1, round(fraction * len(ranks))), len(ranks) - 1) - 1]
    return lambda text: hashlib.sha256(text.encode()).digest() <= last


def _encode(tokenizer: Any, pieces: Iterable[tuple[str, bool]]) -> Iterator[list[int]]:
    batch: list[tuple[str, bool]] = []

    def flush() -> Iterator[list[int]]:
        encoded = tokenizer([text for text, _ in batch], add_special_tokens=False)["input_ids"] if batch else []
        for ids, (_, last) in zip(encoded, batch, strict=True):
            yield [*ids, tokenizer.eos_token_id] if last else ids
        batch.clear()

    for piece in pieces:
        batch.append(piece)
        if len(batch) == _BATCH_PIECES:
            yield from flush()
    yield from flush()


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:32]


def _build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Have one process of this machine build ``target``; return it once it is there, whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{target}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        aside = Path(f"{target}.tmp-{os.getpid()}")
        try:
            build(aside)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target
