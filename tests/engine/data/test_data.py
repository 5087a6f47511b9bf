"""Order, token files, packing and the cache."""

import os
import struct
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from narrowgauge.engine.config.run_blocks import DataBlock
from narrowgauge.engine.data.corpus import content_hash, expand, read_pieces, stdlib_files
from narrowgauge.engine.data.loader import RankSampler, training_loader
from narrowgauge.engine.data.order import sample_order
from narrowgauge.engine.data.packed import PackedTokens
from narrowgauge.engine.data.prepare import prepare_data
from narrowgauge.engine.data.tokenizer import load_tokenizer
from narrowgauge.engine.data.tokens import TokenFile, write_tokens
from narrowgauge.engine.errors import DataError, UserError
from tests.support.forked import server


@pytest.mark.parametrize("num_samples", [1, 2, 3, 10, 64, 65, 1000])
def test_each_epoch_is_a_permutation_of_its_own(num_samples: int) -> None:
    epochs = [sample_order(np.arange(e * num_samples, (e + 1) * num_samples), num_samples, seed=5) for e in range(4)]
    assert all(sorted(epoch.tolist()) == list(range(num_samples)) for epoch in epochs)
    if num_samples >= 10:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
        assert epochs[0].tolist() != sample_order(np.arange(num_samples), num_samples, seed=6).tolist()


def test_order_is_pinned() -> None:
    """A changed order would make resumed runs see samples twice; these numbers may never change."""
    assert sample_order(np.arange(12), 10, seed=1).tolist() == PINNED_ORDER
    assert sample_order(10**15 + 3, 10**12, seed=1).tolist() == PINNED_PLACE


PINNED_ORDER = [4, 8, 6, 7, 2, 1, 0, 9, 5, 3, 2, 6]
PINNED_PLACE = 790498596725


def test_order_looks_random() -> None:
    n = 20_000
    order = sample_order(np.arange(n), n, seed=3)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03
    counts = np.histogram(np.diff(order), bins=20, range=(-n, n))[0]
    expected = np.array([(1 - abs(x + 0.5 - 10) / 10) for x in range(20)]) * n / 10
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected.max())


def samples_of(world_size: int, first_step: int, last_step: int) -> list[list[int]]:
    """Per step, the samples of all ranks together."""
    steps: list[list[int]] = [[] for _ in range(last_step - first_step)]
    for rank in range(world_size):
        sampler = RankSampler(
            partial(sample_order, num_samples=50, seed=2),
            first_step=first_step,
            last_step=last_step,
            micro_batch_size=8 // (2 * world_size),
            accumulation_steps=2,
            rank=rank,
            world_size=world_size,
        )
        for number, batch in enumerate(sampler):
            steps[number // 2] += batch
    return [sorted(step) for step in steps]


def test_samples_of_a_step_do_not_depend_on_ranks_or_resume() -> None:
    whole = samples_of(1, 0, 20)
    assert samples_of(2, 0, 20) == whole
    assert samples_of(4, 0, 20) == whole
    assert samples_of(2, 13, 20) == whole[13:]
    assert {sample for step in whole[:7] for sample in step} == set(range(50))


def write(prefix: Path, documents: list[list[int]]) -> Path:
    write_tokens(prefix, documents, vocab_size=1000)
    return prefix


def test_token_files_are_read_as_written(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [5, 6, 999]]
    file = TokenFile(write(tmp_path / "a", documents))
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 6, 999]
    assert file.document_ends.tolist() == [3, 4, 7]
    assert file.tokens.dtype == np.uint16


def test_token_files_have_megatrons_layout(tmp_path: Path) -> None:
    """Byte for byte what Megatron's own tool writes for these documents."""
    write(tmp_path / "a", [[1, 2, 3], [4]])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 3, 1) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 4)


def test_a_document_of_several_sequences_is_one_document(tmp_path: Path) -> None:
    """Megatron may split a document into sentences; its bounds then skip sequences."""
    write(tmp_path / "a", [[1, 2, 3], [4], [5, 6]])
    data = bytearray((tmp_path / "a.idx").read_bytes()[: -4 * 8])
    data[26:34] = struct.pack("<Q", 3)
    (tmp_path / "a.idx").write_bytes(bytes(data) + struct.pack("<3q", 0, 2, 3))
    assert TokenFile(tmp_path / "a").document_ends.tolist() == [4, 6]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: os.truncate(f"{p}.bin", 6), r"a\.bin has 6 bytes, .*a\.idx describes 14: they do not match"),
        (lambda p: os.truncate(f"{p}.idx", 40), r"a\.idx: cut short: its header says .* bytes, got 40"),
        (lambda p: Path(f"{p}.idx").write_bytes(b"hello"), r"a\.idx: not a Megatron index"),
        (lambda p: Path(f"{p}.bin").unlink(), r"a\.bin: no such file"),
        (lambda p: write(p, []), r"a\.bin: empty"),
    ],
)
def test_token_files_that_disagree_are_named(tmp_path: Path, spoil: Any, message: str) -> None:
    prefix = write(tmp_path / "a", [[1, 2, 3], [4], [5, 6, 7]])
    spoil(prefix)
    with pytest.raises(DataError, match=message):
        prepare_data(block(tmp_path, train=[str(prefix)]))


def test_packing_cuts_streams_and_drops_the_rest(tmp_path: Path) -> None:
    streams = [(tmp_path / "a", np.arange(7)), (tmp_path / "b", np.arange(10, 21))]
    data = PackedTokens(streams, sequence_length=3, vocab_size=100)
    assert [data[i].tolist() for i in range(len(data))] == [
        [0, 1, 2],
        [3, 4, 5],
        [10, 11, 12],
        [13, 14, 15],
        [16, 17, 18],
    ]
    with pytest.raises(DataError, match=r"a: expected tokens below the model's vocab_size, 5, got 5"):
        PackedTokens(streams, sequence_length=3, vocab_size=5)[1]
    with pytest.raises(DataError, match=r"expected at least the 8 tokens of one data\.sequence_length, got 7"):
        PackedTokens(streams[:1], sequence_length=8, vocab_size=100)


def block(tmp_path: Path, **options: Any) -> DataBlock:
    return DataBlock.model_validate({"cache_dir": str(tmp_path / "cache"), "vocab_size": 600, **options})


def test_text_becomes_tokens_that_decode_to_it(corpus: Path, tmp_path: Path) -> None:
    prepared = prepare_data(block(tmp_path, train=[str(corpus / "*.txt")], validation=[str(corpus / "csv.txt")]))
    assert prepared.tokenizer is not None
    assert prepared.vocab_size == 600
    tokenizer = load_tokenizer(prepared.tokenizer)
    tokens = prepared.validation[0][1].tolist()
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[:-1]) == (corpus / "csv.txt").read_text()
    documents = len(list(corpus.glob("*.txt")))
    assert prepared.train[0][1].tolist().count(tokenizer.eos_token_id) == documents


def test_held_out_documents_are_not_trained_on(corpus: Path, tmp_path: Path) -> None:
    prepared = prepare_data(block(tmp_path, train=[str(corpus / "*.txt")], validation_fraction=0.25))
    tokenizer = load_tokenizer(prepared.tokenizer or Path())
    train, valid = (tokenizer.decode(s[0][1].tolist()).split("</s>") for s in (prepared.train, prepared.validation))
    texts = {path.read_text() for path in corpus.glob("*.txt")}
    held = set(valid) - {""}
    assert 0.225 <= sum(map(len, held)) / sum(map(len, texts)) <= 0.275
    assert {*train, *held} - {""} == texts
    assert not set(train) & held


def test_the_cache_is_used_and_follows_the_content(corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    for path in corpus.glob("*.txt"):
        (source / path.name).write_text(path.read_text())
    first = prepare_data(block(tmp_path, train=[str(source / "*.txt")]))
    stamp = Path(first.train[0][0]).stat().st_mtime_ns
    again = prepare_data(block(tmp_path, train=[str(source / "*.txt")]))
    assert again.fingerprint == first.fingerprint
    assert Path(again.train[0][0]).stat().st_mtime_ns == stamp
    (source / "more.txt").write_text("something else entirely\n" * 50)
    assert prepare_data(block(tmp_path, train=[str(source / "*.txt")])).fingerprint != first.fingerprint


def test_a_kept_hash_that_is_still_being_written_is_not_believed(corpus: Path, tmp_path: Path) -> None:
    """Two ranks that started together once read each other's empty files, and disagreed about the data."""
    files = sorted(corpus.glob("*.txt"))
    expected = content_hash(files, tmp_path)
    kept = list((tmp_path / "hashes").iterdir())
    assert len(kept) == len(files)
    whole = [path.read_text() for path in kept]
    kept[0].write_text("")
    kept[1].write_text(whole[1][:17])
    kept[2].write_text(("1" if whole[2][0] == "0" else "0") + whole[2][1:])
    assert content_hash(files, tmp_path) == expected
    assert [path.read_text() for path in kept] == whole


def test_a_file_that_was_replaced_with_its_old_times_is_read_again(tmp_path: Path) -> None:
    """Tools that copy keep the time of modification: with the same size, other text had the old text's hash."""
    path = tmp_path / "a.txt"
    path.write_text("one")
    stat = path.stat()
    first = content_hash([path], tmp_path)
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_hash([path], tmp_path) != first


def prepare_in_process(folder: str, cache: str, queue: Any) -> None:
    prepared = prepare_data(block(Path(cache), train=[f"{folder}/*.txt"]))
    queue.put((str(prepared.train[0][0]), prepared.fingerprint, len(prepared.train[0][1])))


def test_processes_that_start_together_build_once(corpus: Path, tmp_path: Path) -> None:
    context = server()
    queue = context.Queue()
    arguments = (str(corpus), str(tmp_path), queue)
    processes = [context.Process(target=prepare_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(set(results)) == 1
    assert not [path for path in (tmp_path / "cache").rglob("*.tmp-*")]


def test_megatron_files_hold_out_their_last_documents(tmp_path: Path) -> None:
    """Bounds of documents may be a tenth of the share away from it; three documents of twenty were once 11 %."""
    prefix = write(tmp_path / "a", [list(range(10)) for _ in range(20)])
    for name in (prefix, f"{prefix}.bin", f"{prefix}.idx", tmp_path / "a*"):
        prepared = prepare_data(block(tmp_path, train=[str(name)], validation_fraction=0.11))
        assert (len(prepared.train[0][1]), len(prepared.validation[0][1])) == (180, 20)
        assert prepared.tokenizer is None


def test_a_long_last_document_is_cut_rather_than_held_out_whole(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1] * 100, [2] * 20_000])
    prepared = prepare_data(block(tmp_path, train=[str(prefix)], validation_fraction=0.02))
    assert len(prepared.validation[0][1]) == 402
    assert len(prepared.train[0][1]) == 19_698


@pytest.mark.parametrize(("num_files", "length", "fraction"), [(1, 1000, 0.02), (40, 30, 0.02), (7, 150, 0.3)])
def test_token_files_hold_out_the_share_together(tmp_path: Path, num_files: int, length: int, fraction: float) -> None:
    """Each file gave at least one document or token, so many small files gave up to half of all text."""
    prefixes = [str(write(tmp_path / f"f{n}", [[n] * (length // 3)] * 3)) for n in range(num_files)]
    prepared = prepare_data(block(tmp_path, train=prefixes, validation_fraction=fraction))
    train, held = (sum(len(tokens) for _, tokens in side) for side in (prepared.train, prepared.validation))
    assert train + held == num_files * (length // 3) * 3
    assert 0.9 * fraction <= held / (train + held) <= 1.1 * fraction


def test_the_fingerprint_of_token_files_follows_the_tokens(tmp_path: Path) -> None:
    found = set()
    for name, token in (("a", 1), ("b", 2)):
        prefix = write(tmp_path / name, [[token] * 10 for _ in range(20)])
        found.add(prepare_data(block(tmp_path, train=[str(prefix)])).fingerprint)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {"train": ["nothing*.txt"]}, r"data\.train: '.*nothing\*\.txt' names no file"),
        ({"a.txt": ""}, {"train": ["a.txt"]}, r"data\.train: expected text, got 1 empty files"),
        (
            {"a.txt": "x\n"},
            {"train": ["a.txt"], "validation": ["b.txt"]},
            r"data\.validation: '.*b\.txt' names no file",
        ),
        ({"a.txt": b"caf\xe9\n"}, {"train": ["a.txt"]}, r"a\.txt: not UTF-8 text"),
        ({"a.txt": "x y z\n" * 20}, {"train": ["a.txt"]}, r"data\.vocab_size: no tokenizer of 600 pieces"),
        ({"a.txt": "x"}, {"train": ["a.txt"], "tokenizer": "none"}, r"data\.tokenizer: expected .*, got .*none"),
        ({"a.txt": "x"}, {"train": ["a.txt"], "tokenizer": "a.txt"}, r"data\.tokenizer: expected .*, got .*a\.txt"),
        ({"a.txt": "x"}, {"train": [""]}, r"data\.train: '.*' names no file; it is a folder"),
        ({"a.bin": "x", "b.txt": "x"}, {"train": ["a.bin", "b.txt"]}, r"token files .* and text files are mixed"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, files: dict[str, Any], options: dict[str, Any], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    paths = {
        key: [str(tmp_path / n) for n in v] if isinstance(v, list) else str(tmp_path / v) for key, v in options.items()
    }
    with pytest.raises(DataError, match=message):
        prepare_data(block(tmp_path, **paths))
    assert not [path for path in tmp_path.rglob("*.tmp-*")]


def test_a_single_document_is_cut_for_validation(corpus: Path, tmp_path: Path) -> None:
    """It was refused, since it is a single piece; of two or three pieces one was held out, up to half of the text."""
    text = (corpus / "argparse.txt").read_text()
    (tmp_path / "a.txt").write_text(text)
    prepared = prepare_data(block(tmp_path, train=[str(tmp_path / "a.txt")], sequence_length=32))
    tokenizer = load_tokenizer(prepared.tokenizer or Path())
    train, held = (tokenizer.decode(s[0][1].tolist()).split("</s>") for s in (prepared.train, prepared.validation))
    assert train[0] + held[0] == text
    assert train[1:] == held[1:] == [""]
    assert 0.018 <= len(held[0]) / len(text) <= 0.022


def test_a_share_without_a_sample_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text((corpus / "heapq.txt").read_text())
    options = {"sequence_length": 512, "validation_fraction": 0.01}
    with pytest.raises(
        DataError, match=r"data\.validation: .* 512 tokens of one data\.sequence_length, got \d+ in the"
    ):
        prepare_data(block(tmp_path, train=[str(tmp_path / "a.txt")], **options))


@pytest.mark.parametrize("name", ["a[1].txt", "[x]/*.txt", "[x]/b?.txt"])
def test_brackets_in_names_are_no_globs(tmp_path: Path, name: str) -> None:
    """Such a file existed and "named no file"."""
    (tmp_path / "[x]").mkdir()
    for path in (tmp_path / "a[1].txt", tmp_path / "[x]" / "b1.txt"):
        path.write_text("text")
    found = expand([str(tmp_path / name)], "data.train")
    assert [path.name for path in found] == ["a[1].txt" if name.startswith("a") else "b1.txt"]


@pytest.mark.parametrize("key", ["train", "validation", "tokenizer", "cache_dir"])
@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b"])
def test_paths_that_cannot_be_are_named(corpus: Path, tmp_path: Path, key: str, path: str) -> None:
    """They ended in a traceback."""
    listed = key in ("train", "validation")
    options = {"train": [str(corpus / "*.txt")], key: [path] if listed else path}
    with pytest.raises(UserError, match=rf"^data\.{key}: expected a path, got"):
        prepare_data(block(tmp_path, **options))


def test_long_files_are_read_in_pieces_that_join_to_them(tmp_path: Path) -> None:
    text = "".join(f"line {n} \u00e9\r\n" for n in range(200_000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(read_pieces([tmp_path / "a.txt"], skip_undecodable=False))
    assert len(pieces) > 2
    assert "".join(piece for piece, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.endswith("\n") for piece, _ in pieces)


@pytest.mark.parametrize(("word", "cut_at"), [("caf\u00e9 ", " "), ("\u00e9", "\u00e9")])
def test_a_line_longer_than_a_piece_is_cut(tmp_path: Path, word: str, cut_at: str) -> None:
    """A file without line ends was one piece, however long."""
    text = "a line\n" + word * 1_000_000 + "\nanother\n"
    (tmp_path / "a.txt").write_text(text)
    pieces = [piece for piece, _ in read_pieces([tmp_path / "a.txt"], skip_undecodable=False)]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= (1 << 20) + 4096
    assert all(piece.endswith(cut_at) for piece in pieces[:-1])


def test_the_standard_library_is_more_than_ten_megabytes() -> None:
    files = stdlib_files()
    assert sum(path.stat().st_size for path in files) > 10_000_000
    assert not any("site-packages" in path.parts for path in files)


class SlowTokens(PackedTokens):
    """Each sample takes a tenth of a second to read."""

    def __getitem__(self, sample: int) -> torch.Tensor:
        time.sleep(0.1)
        return super().__getitem__(sample)


@pytest.mark.alone
def test_training_does_not_wait_for_a_loader_that_keeps_up_on_average() -> None:
    """Reading a batch takes 0.2 s, a step a little more: read ahead, the second hides the first."""
    data = SlowTokens([(Path("a"), np.arange(1000))], sequence_length=4, vocab_size=1000)
    sampler = RankSampler(
        partial(sample_order, num_samples=len(data), seed=0),
        first_step=0,
        last_step=12,
        micro_batch_size=2,
        accumulation_steps=1,
        rank=0,
        world_size=1,
    )
    batches = iter(training_loader(data, sampler, num_workers=1))
    waits = []
    for _ in range(12):
        begin = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - begin)
        time.sleep(0.25)
    assert sum(waits[2:]) < 0.5
