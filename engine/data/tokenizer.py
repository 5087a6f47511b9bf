"""Tokenizers: one the user has, or a sentencepiece BPE trained on the corpus, always as a Hugging Face folder."""

import hashlib
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece

from ..errors import DataError, one_line

_TRAINING_LINES = 100_000
# What sentencepiece takes at most; it leaves longer lines out.
_LINE_BYTES = 4192
_NEAR_SPACE = re.compile(rb"[ \t](?=[^ \t]{0,200}$)")
_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_HF_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "legacy": False,
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
}


def holds_tokenizer(folder: Path) -> bool:
    """Whether any of the files that a Hugging Face tokenizer is read from lies in a folder."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(folder: Path) -> Any:
    """A Hugging Face tokenizer from a local folder.

    Raises:
        DataError: the folder holds none, or one without a vocabulary or an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        # Code that lies in the folder is not run, nor asked about.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Each kind of tokenizer, and the Rust below it, raises what comes.
        raise DataError(f"data.tokenizer: {folder} holds no Hugging Face tokenizer: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"data.tokenizer: {folder} has no end-of-sequence token to put between documents")
    # transformers makes tokenizers of nothing, which read nothing of any text; T5's knows the mark of a word's begin.
    special = set(tokenizer.all_special_tokens)
    if len(set(tokenizer.get_vocab()) - special) < 2:
        raise DataError(
            f"data.tokenizer: {folder}: expected a vocabulary (tokenizer.json, tokenizer.model, or vocab.json and"
            f" merges.txt), got {type(tokenizer).__name__} with nothing but {len(special)} special tokens"
        )
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what a tokenizer does to text, from whichever files it was read."""
    digest = hashlib.sha256()
    digest.update(f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {len(tokenizer)}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        special = {"tokens": tokenizer.special_tokens_map, "split": getattr(tokenizer, "split_special_tokens", None)}
        digest.update(json.dumps(special, sort_keys=True, default=str).encode() + backend.to_str().encode())
        return digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def sentencepiece_hash(source: Path) -> str:
    """A hash of a sentencepiece ``.model``.

    Raises:
        DataError: it is none.
    """
    try:
        raw = source.read_bytes()
        sentencepiece.SentencePieceProcessor(model_proto=raw)  # pyright: ignore[reportCallIssue]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data.tokenizer: expected a Hugging Face tokenizer folder or a sentencepiece .model, got {source}"
        ) from error
    return hashlib.sha256(raw).hexdigest()


def wrap_sentencepiece(model: Path | bytes, folder: Path) -> None:
    """Make ``folder`` a Hugging Face tokenizer folder around a sentencepiece model."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, bytes):
        (folder / "tokenizer.model").write_bytes(model)
    else:
        shutil.copyfile(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(_HF_CONFIG, indent=2))


def train_tokenizer(read: Callable[[], Iterable[str]], vocab_size: int, folder: Path) -> None:
    """Train a sentencepiece BPE with byte fallback and write it to ``folder``.

    Unknown is token 0, begin 1, end 2. Lines are sampled evenly over the corpus, so the result only depends on the
    text. Lines that sentencepiece would leave out for their length are cut.

    Raises:
        DataError: the text is too little for this vocabulary.
    """
    num_lines, num_chars = 0, 0
    for piece in read():
        num_lines += piece.count("\n")
        num_chars += len(piece)
    stride = max(1, num_lines // _TRAINING_LINES)
    # Lines of 4 KiB and more: as many as there may be of this length at most.
    cut_stride = max(1, math.ceil(num_chars / stride / _LINE_BYTES / _TRAINING_LINES))
    lines = islice((line for piece in read() for line in piece.splitlines() if line.strip()), 0, None, stride)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=_short_lines(lines, cut_stride),
            max_sentence_length=_LINE_BYTES,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"data.vocab_size: no tokenizer of {vocab_size} pieces can be trained on this text: {error}"
        ) from error
    wrap_sentencepiece(model.getvalue(), folder)


def _short_lines(lines: Iterable[str], stride: int) -> Iterator[str]:
    """The lines, those of more than ``_LINE_BYTES`` in parts, of which every ``stride``-th is taken."""
    number = 0
    for line in lines:
        if len(line.encode()) <= _LINE_BYTES:
            yield line
            continue
        for part in _cut(line.encode()):
            if number % stride == 0 and part.strip():
                yield part
            number += 1


def _cut(raw: bytes) -> Iterator[str]:
    start = 0
    while start < len(raw):
        part = raw[start : start + _LINE_BYTES]
        if start + _LINE_BYTES < len(raw) and (space := _NEAR_SPACE.search(part, len(part) - 256)):
            part = part[: space.end()]
        # Not within a character.
        text = part.decode(errors="ignore")
        start += len(text.encode())
        yield text
