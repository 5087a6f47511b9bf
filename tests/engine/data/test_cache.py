"""What is kept is what was built, for the tokenizer and text that it was built from."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer

from narrowgauge.engine.config.run_blocks import DataBlock
from narrowgauge.engine.data import cache
from narrowgauge.engine.data.cache import build_once, digest_of
from narrowgauge.engine.data.prepare import prepare_data
from narrowgauge.engine.data.tokenizer import load_tokenizer, tokenizer_hash
from narrowgauge.engine.ranks.agreement import agree
from tests.support.ranks import RankPool

TEXTS = ("a tokenizer learns from its text. " * 50, "klm nop qrs tuv wxyz klmnop qrstuv 0123 " * 50)


def byte_level(folder: Path, text: str) -> None:
    """``vocab.json`` and ``merges.txt``."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(iter([text]), vocab_size=300, special_tokens=["<|endoftext|>"])
    folder.mkdir()
    tokenizer.save_model(str(folder))
    special = dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))


def word_pieces(folder: Path, text: str) -> None:
    """``vocab.txt``."""
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(iter([text]), vocab_size=120, show_progress=False)
    folder.mkdir()
    tokenizer.save_model(str(folder))
    settings = {"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("make", [byte_level, word_pieces])
def test_each_tokenizer_has_its_own_tokens(corpus: Path, tmp_path: Path, make: Any) -> None:
    """Only some names of files were part of the key: the second tokenizer was given the first one's tokens."""
    prepared = []
    for name, text in zip(("one", "two"), TEXTS, strict=True):
        make(tmp_path / name, text)
        options = {"tokenizer": str(tmp_path / name), "sequence_length": 16, "cache_dir": str(tmp_path / "cache")}
        prepared.append(prepare_data(DataBlock.model_validate({"train": [str(corpus / "csv.txt")], **options})))
        tokens = prepared[-1].validation[0][1].tolist()
        tokenizer = load_tokenizer(tmp_path / name)
        text = tokenizer.decode(tokens[:-1])
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens[:-1]
    assert prepared[0].fingerprint != prepared[1].fingerprint
    assert not np.array_equal(prepared[0].train[0][1], prepared[1].train[0][1])


def test_a_tokenizer_in_other_files_is_the_same(tmp_path: Path) -> None:
    byte_level(tmp_path / "one", TEXTS[0])
    load_tokenizer(tmp_path / "one").save_pretrained(str(tmp_path / "two"))
    assert (tmp_path / "two" / "tokenizer.json").is_file()
    hashes = [tokenizer_hash(load_tokenizer(tmp_path / name)) for name in ("one", "two")]
    assert hashes[0] == hashes[1]
    settings = json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())
    (tmp_path / "two" / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "t"}))
    assert tokenizer_hash(load_tokenizer(tmp_path / "two")) != hashes[0]


def flip_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("what", ["tokens/*/train.bin", "tokens/*/train.idx", "tokenizers/*/tokenizer.model"])
def test_a_flipped_bit_is_found(corpus: Path, tmp_path: Path, caplog: Any, what: str) -> None:
    """The run was trained on whatever the cache held."""
    cache = tmp_path / "cache"
    options = {"vocab_size": 400, "sequence_length": 16, "cache_dir": str(cache)}
    block = DataBlock.model_validate({"train": [str(corpus / "csv.txt")], **options})
    first = prepare_data(block)
    expected = np.array(first.train[0][1])
    (damaged,) = cache.glob(what)
    whole = damaged.read_bytes()
    flip_a_bit(damaged, len(whole) // 2)
    with caplog.at_level(logging.WARNING):
        again = prepare_data(block)
    assert f"changed since it was written: {damaged.name}" in caplog.text
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.train[0][1], expected)
    assert damaged.read_bytes() == whole


def test_files_that_are_gone_or_new_are_found(tmp_path: Path) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        folder.mkdir()
        (folder / "a").write_text("text")

    target = tmp_path / "target"
    build_once(target, build)
    for change in ((target / "a").unlink, (target / "b").touch, (target / "digests.json").unlink):
        change()
        for _ in range(2):
            assert build_once(target, build) == target
            assert sorted(path.name for path in target.iterdir()) == ["a", "digests.json"]
    assert len(built) == 4


def prepared_together(folder: str, *, again: bool) -> tuple[list[int], int]:
    """The tokens that this rank reads, and the bytes of the token cache that it hashes."""
    num_bytes = 0

    def counted(path: Path) -> str:
        nonlocal num_bytes
        num_bytes += path.stat().st_size
        return digest_of(path)

    dist.barrier()
    if again:
        agree({})
    options = {"vocab_size": 400, "sequence_length": 16, "cache_dir": f"{folder}/cache"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "digest_of", counted)
        tokens = prepare_data(DataBlock.model_validate({"train": [f"{folder}/csv.txt"], **options})).train[0][1]
    dist.barrier()
    return tokens.tolist(), num_bytes


def test_one_rank_of_a_host_hashes_the_cache(two_ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Each rank hashed all of it at each start."""
    shutil.copy(corpus / "csv.txt", tmp_path)
    expected = two_ranks.run(prepared_together, str(tmp_path), again=False)[0][0]
    kept = [p for p in tmp_path.glob("cache/*/*/*") if p.is_file() and p.name != "digests.json"]
    total = sum(path.stat().st_size for path in kept)
    for flipped in (False, True):
        if flipped:
            flip_a_bit(next(tmp_path.glob("cache/tokens/*/train.bin")), 11)
        found = two_ranks.run(prepared_together, str(tmp_path), again=True)
        assert [tokens for tokens, _ in found] == [expected, expected]
        hashed = sum(num_bytes for _, num_bytes in found)
        # Damage is found, made sure of under the lock, and what is made anew is hashed as it is written.
        tokens = sum(path.stat().st_size for path in kept if path.parent.parent.name == "tokens")
        assert hashed == (total + 2 * tokens if flipped else total)
