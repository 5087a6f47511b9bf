"""From documents of text and token files to streams of tokens, through a cache keyed by content."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config.run_blocks import DataBlock, SourceBlock
from ..errors import DataError
from ..files import local_path
from .cache import FORMAT, build_once, cache_key
from .corpus import content_hash, expand, is_token_prefix, read_pieces, stdlib_files, token_prefix
from .holdout import Holdout
from .packed import PackedTokens
from .plain_text import check_plain_text
from .tokenizer import load_tokenizer, sentencepiece_hash, tokenizer_hash, train_tokenizer, wrap_sentencepiece
from .tokens import TokenFile, write_tokens

_BATCH_PIECES = 64
# Of the share asked for: how far a document's bound may be from it.
_TOLERANCE = 0.1
OF_RECORDS = ("format", "packing", "too_long", "chat_template")
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

    def samples(self, sequence_length: int, vocab_size: int) -> tuple[PackedTokens, PackedTokens]:
        """For training and validation, of a model with this vocabulary."""
        train, validation = (PackedTokens(side, sequence_length, vocab_size) for side in (self.train, self.validation))
        return train, validation

    def counts(self) -> dict[str, Any]:
        """Nothing is cut off, and there is one source."""
        return {}


def prepare_data(block: DataBlock, notify: Callable[[str], None] = lambda text: None) -> PreparedData:
    """Find the data, train the tokenizer and tokenize if that has not been done for this content.

    Args:
        block: the configuration's ``data``.
        notify: told what is being built, by the process that builds it.

    Raises:
        DataError: files are missing, empty, damaged or of mixed kinds, or the cache cannot be written.
    """
    cache = made_cache(block)
    for key in OF_RECORDS:
        if key in block.model_fields_set:
            raise DataError(f"data.{key}: expected records (JSON, Parquet, datasets) as data.train with it, got others")
    files = stdlib_files() if block.train == "stdlib" else expand(_paths(block.train, "data.train"), "data.train")
    held_out = _paths(block.validation or [], "data.validation")
    validation = expand(held_out, "data.validation") if block.validation is not None else []
    kinds = {is_token_prefix(path) for path in files + validation}
    if kinds == {True, False}:
        raise DataError("data: token files (.bin/.idx) and text files are mixed; one kind is allowed")
    if kinds == {True}:
        return _prepare_tokens(block, cache, files, validation)
    if block.train != "stdlib":
        for key, named in (("data.train", files), ("data.validation", validation)):
            for path in named:
                check_plain_text(path, key)
    return _prepare_text(block, cache, files, validation, notify)


def made_cache(block: DataBlock) -> Path:
    """The cache's folder.

    Raises:
        DataError: it cannot be made.
    """
    cache = local_path(block.cache_dir, "data.cache_dir")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir: {cache} cannot be made: {error}") from error
    return cache


def _paths(sources: Sequence[SourceBlock], key: str) -> list[str]:
    for number, source in enumerate(sources):
        for name in ("name", "weight"):
            if getattr(source, name) is not None:
                raise DataError(f"{key}.{number}.{name}: only sources of records have one, {source.path!r} is none")
    return [source.path for source in sources]


def _prepare_tokens(block: DataBlock, cache: Path, files: list[Path], validation: list[Path]) -> PreparedData:
    prefixes = list(dict.fromkeys(map(token_prefix, files)))
    held_out = list(dict.fromkeys(map(token_prefix, validation)))
    train: Streams = []
    valid: Streams = [(file.bin_path, file.tokens) for file in map(TokenFile, held_out)]
    owed = 0.0
    for file in map(TokenFile, prefixes):
        owed += 0.0 if held_out else block.validation_fraction * len(file.tokens)
        end = _last_documents(file, owed)
        owed -= len(file.tokens) - end
        train.append((file.bin_path, file.tokens[:end]))
        if not held_out:
            valid.append((file.bin_path, file.tokens[end:]))
    content = content_hash([Path(f"{p}{end}") for p in prefixes + held_out for end in (".idx", ".bin")], cache)
    tokenizer, _ = own_tokenizer(block, cache) if block.tokenizer is not None else (None, None)
    vocab_size = len(load_tokenizer(tokenizer)) if tokenizer is not None else None
    # Where files are named for validation, nothing is split, and runs of the first version go on.
    version = 1 if held_out else FORMAT
    fingerprint = cache_key("token files", content, block.validation_fraction, len(held_out), version=version)
    return PreparedData(train, valid, tokenizer, vocab_size, fingerprint)


def _last_documents(file: TokenFile, wanted: float) -> int:
    """Where the last ``wanted`` tokens start: at the nearest document's bound unless that is too far from them."""
    num_tokens = len(file.tokens)
    start = num_tokens - min(max(round(wanted), 0), num_tokens)
    bounds = np.concatenate(([0], file.document_ends))
    nearest = int(bounds[np.abs(bounds - start).argmin()])
    return nearest if abs(nearest - start) <= _TOLERANCE * min(num_tokens - start, start) else start


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
        folder, tokenizer = own_tokenizer(block, cache)
    else:
        notify_of = partial(notify, f"training a tokenizer of {block.vocab_size} pieces on {len(files)} text files")
        folder, tokenizer = trained_tokenizer(
            block, cache, content, lambda: (text for text, _ in pieces(files)), notify_of
        )
    fraction = None if validation else block.validation_fraction
    key = cache_key("tokens", content, tokenizer_hash(tokenizer), fraction, embedded)

    def tokenize(target: Path) -> None:
        notify(f"tokenizing {len(files) + len(validation)} text files")
        target.mkdir()
        if fraction is None:
            parts = {"train": pieces(files), "validation": pieces(validation)}
        else:
            holdout = Holdout(pieces(files), fraction)
            parts = {"train": holdout.select(pieces(files), False), "validation": holdout.select(pieces(files), True)}
        for name, selected in parts.items():
            if write_tokens(target / name, _encode(tokenizer, selected), len(tokenizer)) == 0:
                raise DataError(f"data.{name}: no text was left for it")

    tokens = build_once(cache / "tokens" / key, tokenize)
    train, held_out = (TokenFile(tokens / name) for name in ("train", "validation"))
    if len(held_out.tokens) < block.sequence_length <= len(train.tokens):
        source = f"the {fraction:.2%} of data.validation_fraction" if fraction is not None else "data.validation"
        raise DataError(
            f"data.validation: expected at least the {block.sequence_length} tokens of one data.sequence_length, got"
            f" {len(held_out.tokens)} in {source}"
        )
    streams: list[Streams] = [[(file.bin_path, file.tokens)] for file in (train, held_out)]
    return PreparedData(streams[0], streams[1], folder, len(tokenizer), key)


def trained_tokenizer(
    block: DataBlock, cache: Path, content: str, read: Callable[[], Iterable[str]], notify: Callable[[], None]
) -> tuple[Path, Any]:
    """The folder of a tokenizer that is trained on the text, and the tokenizer.

    Args:
        content: a hash of the text.
        notify: called where it is trained.
    """

    def learn(target: Path) -> None:
        notify()
        train_tokenizer(read, block.vocab_size, target)

    folder = build_once(cache / "tokenizers" / cache_key("sentencepiece-bpe", content, block.vocab_size), learn)
    return folder, load_tokenizer(folder)


def own_tokenizer(block: DataBlock, cache: Path) -> tuple[Path, Any]:
    """The folder of the user's tokenizer, and the tokenizer."""
    assert block.tokenizer is not None
    source = local_path(block.tokenizer, "data.tokenizer")
    if not source.is_dir():
        key = cache_key("wrapped", sentencepiece_hash(source))
        source = build_once(cache / "tokenizers" / key, partial(wrap_sentencepiece, source))
    return source, load_tokenizer(source)


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
