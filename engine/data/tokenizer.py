"""Tokenizers: one the user has, or a sentencepiece BPE trained on the corpus, always as a Hugging Face folder."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece

from ..errors import DataError

_TRAINING_LINES = 100_000
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


def load_tokenizer(folder: Path) -> Any:
    """A Hugging Face tokenizer from a local folder.

    Raises:
        DataError: the folder holds none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"data.tokenizer: {folder} holds no Hugging Face tokenizer: {error}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"data.tokenizer: {folder} has no end-of-sequence token to put between documents")
    return tokenizer


def tokenizer_hash(source: Path) -> str:
    """A hash of a tokenizer's files (of a folder, or of a sentencepiece ``.model``).

    Raises:
        DataError: there is nothing there.
    """
    files = sorted(source.glob("*token*")) + sorted(source.glob("*.model")) if source.is_dir() else [source]
    if not files or not all(path.is_file() for path in files):
        raise DataError(
            f"data.tokenizer: expected a Hugging Face tokenizer folder or a sentencepiece .model, got {source}"
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


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
    text.

    Raises:
        DataError: the text is too little for this vocabulary.
    """
    num_lines = sum(piece.count("\n") for piece in read())
    stride = max(1, num_lines // _TRAINING_LINES)
    lines = (line for piece in read() for line in piece.splitlines() if line.strip())
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=islice(lines, 0, None, stride),
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
