"""Training a tokenizer, and reading one."""

import json
import random
from pathlib import Path

import pytest

from narrowgauge.engine.data.tokenizer import load_tokenizer, train_tokenizer
from narrowgauge.engine.errors import DataError

RANDOM = random.Random(0)
WORDS = ["".join(RANDOM.choices("abcdefghijklm", k=6)) for _ in range(200)]


def vocabulary(folder: Path, pieces: list[str]) -> set[str]:
    train_tokenizer(lambda: pieces, 400, folder)
    return set(load_tokenizer(folder).get_vocab())


def test_long_lines_are_learnt_from(tmp_path: Path) -> None:
    """Sentencepiece leaves out lines above 4192 bytes: text of long lines ended in an error that blamed vocab_size."""
    rng = random.Random(1)
    words = [rng.choice(WORDS) for _ in range(3000)]
    short = vocabulary(tmp_path / "short", [" ".join(words[at : at + 10]) + "\n" for at in range(0, 3000, 10)])
    long = vocabulary(tmp_path / "long", [" ".join(words)])
    assert len(long) == 400
    # The counts at the cuts differ a little, and with them the last pieces.
    assert len(long & short) > 350


def test_a_long_line_among_short_ones_counts(tmp_path: Path) -> None:
    """It was skipped, with all its characters."""
    text = ["abc def\n" * 500, "\u0416\u0418\u0429 " * 3000 + "\n"]
    assert "\u0416" in "".join(vocabulary(tmp_path / "a", [*text, " ".join(WORDS)]))


def test_a_line_without_spaces_is_cut_between_characters(tmp_path: Path) -> None:
    rng = random.Random(2)
    line = "".join(rng.choice("\u4e00\u4e01\u4e02\u4e03\u4e04") for _ in range(20_000))
    found = vocabulary(tmp_path / "a", [line])
    assert "\ufffd" not in "".join(found)
    assert {"\u4e00", "\u4e01", "\u4e02", "\u4e03", "\u4e04"} < found


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "T5Tokenizer"])
def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path, name: str) -> None:
    """transformers makes a tokenizer of it that drops all text; the tokens' file was said to be too short."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(DataError, match=rf": expected a vocabulary .*, got {name} with nothing but \d+ special"):
        load_tokenizer(tmp_path)
