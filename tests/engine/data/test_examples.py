"""Records: what is read of them, which tokens are learned, and what is refused."""

import gzip
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from narrowgauge.engine.config.run_blocks import DataBlock
from narrowgauge.engine.data import cache, corpus, encode, layout
from narrowgauge.engine.data.examples import PreparedExamples
from narrowgauge.engine.data.mixture import Mixture
from narrowgauge.engine.data.run_data import prepare
from narrowgauge.engine.errors import DataError
from tests.support.chat import (
    PLAIN_TEMPLATE,
    TEMPLATE,
    conversations,
    save_tokenizer,
    write_dataset,
    write_lines,
    write_parquet,
)

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "chat")


@pytest.fixture
def prepared(tokenizer: Path, tmp_path: Path) -> Callable[..., PreparedExamples]:
    def make(train: Path | str | list[Any], **options: Any) -> PreparedExamples:
        given = {"tokenizer": str(tokenizer), "sequence_length": 64, "cache_dir": str(tmp_path / "cache"), **options}
        sources = train if isinstance(train, list) else [str(train)]
        found = prepare(DataBlock.model_validate({"train": sources, **given}))
        assert isinstance(found, PreparedExamples)
        return found

    return make


def rows(mixture: Mixture) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each sample, without padding, in the order of the data."""
    found = []
    for sample in range(len(mixture)):
        batch = mixture.micro_batch([sample])
        assert batch.attention_mask is not None
        length = int(batch.attention_mask.sum())
        found.append((batch.tokens[0, :length].tolist(), batch.labels[0, :length].tolist()))
    return found


def test_kinds_of_files_say_the_same(prepared: Any, tmp_path: Path) -> None:
    """200 conversations as JSON Lines, plain and compressed, as a list, as Parquet and as a folder of datasets."""
    records = conversations(200)
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    paths = [tmp_path / "a.json", *(write_lines(tmp_path / name, records) for name in ("a.jsonl", "b.jsonl.gz"))]
    paths += [write_lines(tmp_path / "c.jsonl.zst", records), write_parquet(tmp_path / "d.parquet", records)]
    paths.append(write_dataset(tmp_path / "folder", records))
    expected = prepared(paths[0], validation_fraction=0.1)
    assert (len(expected.train), len(expected.validation)) == (180, 20)
    for path in paths[1:]:
        found = prepared(path, validation_fraction=0.1)
        assert rows(found.train) == rows(expected.train)
        assert rows(found.validation) == rows(expected.validation)
    held, trained = ({tuple(tokens) for tokens, _ in rows(side)} for side in (expected.validation, expected.train))
    assert not held & trained


def trl_rows(dataset: list[dict[str, Any]], tokenizer: Path, folder: Path, **options: Any) -> list[Any]:
    """Tokens and labels by TRL: its preparation of the data and its collator."""
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    datasets.disable_progress_bars()
    sizes: Any = {"vocab_size": 320, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_length=64, report_to="none", use_cpu=True, bf16=False, **options
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(dataset),
        processing_class=AutoTokenizer.from_pretrained(str(tokenizer)),
    )
    found = []
    for example in trainer.train_dataset:
        batch = trainer.data_collator([example])
        found.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return found


def of_format(name: str) -> list[dict[str, Any]]:
    """Records of a format, some of them longer than 64 tokens."""
    found: list[dict[str, Any]] = []
    for record in conversations(40):
        messages = record["messages"]
        texts = [message["content"] for message in messages]
        if name == "messages":
            found.append({"messages": messages})
        elif name == "completion of messages":
            found.append({"prompt": messages[:-1][-2:], "completion": messages[-1:]})
        elif name == "prompt_completion":
            found.append({"prompt": f"{texts[-2]}:", "completion": " " + " ".join(texts)})
        else:
            found.append({"text": " ".join(texts)[:200]})
    return found


@pytest.mark.parametrize("name", ["messages", "completion of messages", "prompt_completion", "text"])
@pytest.mark.parametrize("bos", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_labels_are_trls(prepared: Any, tmp_path: Path, name: str, bos: bool) -> None:
    """Of a text too long for a sample TRL drops the end, which is kept here: compared are those that fit."""
    records = of_format(name)
    folder = save_tokenizer(tmp_path / "tokenizer", bos=bos)
    expected = trl_rows(records, folder, tmp_path / "trl", assistant_only_loss=name == "messages")
    path = write_lines(tmp_path / "a.jsonl", records)
    options = {"validation": [str(write_lines(tmp_path / "v.jsonl", records[:2]))], "tokenizer": str(folder)}
    found = rows(prepared(path, **options).train)
    if name == "text":
        expected, found = ([row for row in side if len(row[0]) < 64 and row[0][-1] == 2] for side in (expected, found))
        assert len(expected) >= 20
    assert found == expected
    assert any(label == -100 for _, labels in found for label in labels) == (name != "text")


def test_alpaca_is_a_conversation_whose_answer_is_learned(prepared: Any, tmp_path: Path) -> None:
    alpaca = [
        {"instruction": "what is", "input": "the cat", "output": "big"},
        {"instruction": "where", "input": "", "output": "on the mat", "system": "small", "history": [["who", "a dog"]]},
    ] * 2
    as_messages = [
        {
            "prompt": [{"role": "user", "content": "what is\nthe cat"}],
            "completion": [{"role": "assistant", "content": "big"}],
        },
        {
            "prompt": [
                {"role": "system", "content": "small"},
                {"role": "user", "content": "who"},
                {"role": "assistant", "content": "a dog"},
                {"role": "user", "content": "where"},
            ],
            "completion": [{"role": "assistant", "content": "on the mat"}],
        },
    ] * 2
    sides = []
    for name, records in (("a", alpaca), ("b", as_messages)):
        path = write_lines(tmp_path / f"{name}.jsonl", records)
        sides.append(rows(prepared(path, validation=[str(path)]).train))
    assert sides[0] == sides[1]
    answer = [label for label in sides[0][0][1] if label != -100]
    assert len(answer) >= 2
    assert answer[-1] == 2


def test_a_text_that_is_too_long_is_cut_and_every_token_learned_once(prepared: Any, tmp_path: Path) -> None:
    long, short = "the cat sat on " * 60, "a dog"
    path = write_lines(tmp_path / "a.jsonl", [{"text": long}, {"text": short}])
    found = prepared(path, validation=[str(path)])
    counts = found.counts()[str(path)]
    assert (counts["cut"], counts["truncated"], counts["dropped"]) == (1, 0, 0)
    parts = rows(found.train)
    assert len(parts) == counts["samples"] > 2
    assert all(len(tokens) == 64 for tokens, _ in parts[:-2])
    whole = parts[0][0] + [token for tokens, _ in parts[1:-1] for token in tokens[1:]]
    assert len(whole) == counts["longest"]
    assert whole[-1] == 2
    assert counts["learned"] == counts["longest"] - 1 + len(parts[-1][0]) - 1


def test_truncation_is_counted_and_may_leave_out(prepared: Any, tmp_path: Path) -> None:
    records = conversations(60)
    path = write_lines(tmp_path / "a.jsonl", records)
    whole = prepared(path, validation=[str(path)], sequence_length=256)
    lengths = np.array([len(tokens) for tokens, _ in rows(whole.train)])
    truncated = prepared(path, validation=[str(path)], sequence_length=48)
    dropped = prepared(path, validation=[str(path)], sequence_length=48, too_long="drop")
    long = int((lengths > 48).sum())
    assert 0 < long < 30
    assert truncated.counts()[str(path)]["truncated"] == dropped.counts()[str(path)]["dropped"] == long
    assert [len(t) for t, _ in rows(truncated.train)] == np.minimum(lengths, 48).tolist()
    assert [len(t) for t, _ in rows(dropped.train)] == lengths[lengths <= 48].tolist()


def test_what_is_not_learned_has_no_gradient_at_the_logits(prepared: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = write_lines(tmp_path / "a.jsonl", conversations(8))
    for packing in (False, True):
        batch = prepared(path, validation=[str(path)], packing=packing).train.micro_batch([0, 1, 2])
        torch.manual_seed(0)
        sizes: Any = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, use_cache=False, **sizes))
        found = model(**batch.inputs())
        found.logits.retain_grad()
        found.loss.backward()
        has_gradient = found.logits.grad.abs().sum(-1) > 0
        learned = torch.nn.functional.pad(batch.labels[:, 1:] != -100, (0, 1))
        assert torch.equal(has_gradient, learned)
        assert int(learned.sum()) == batch.num_learned
        assert 0.1 < learned.float().mean() < 0.9


MESSAGE = {"role": "user", "content": "the cat"}
ANSWER = {"role": "assistant", "content": "sat"}
GOOD = {"messages": [MESSAGE, ANSWER]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": [}\n', r"a\.jsonl: line 3, column \d+: expected a JSON object, got a broken one"),
        ("[1]\n", r"a\.jsonl: line 3: expected a JSON object, got a list"),
        ({"text": "the cat"}, r"line 3: expected the columns messages of the format 'messages', got \['text'\]"),
        ({"messages": "the cat"}, r'line 3: messages: expected a list, got "the cat"'),
        ({"messages": [MESSAGE, "sat"]}, r"line 3: messages\[1\]: expected an object with role and content"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r"line 3: messages\[0\]: expected a role of .*, got \"bot\""),
        ({"messages": [MESSAGE, {"role": "assistant"}]}, r"line 3: messages\[1\]: content: expected a text, got null"),
        ({"messages": [MESSAGE]}, r"line 3: messages: expected one with the role 'assistant' to learn, got none"),
        ({"messages": []}, r"line 3: messages: expected messages, got an empty list"),
        (b'{"messages": "caf\xe9"}\n', r"line 3: not UTF-8 text"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(prepared: Any, tmp_path: Path, content: Any, message: str) -> None:
    raw = json.dumps(content) + "\n" if isinstance(content, dict) else content
    lines = f"{json.dumps(GOOD)}\n\n".encode() + (raw if isinstance(raw, bytes) else raw.encode())
    (tmp_path / "a.jsonl").write_bytes(lines + f"{json.dumps(GOOD)}\n".encode())
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / "a.jsonl")
    assert not [path for path in tmp_path.rglob("*.tmp-*")]


def spoiled(folder: Path, kind: str) -> Path:
    raw = gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in conversations(2000)))
    if kind == "gzip":
        path = folder / "a.jsonl.gz"
        path.write_bytes(raw[: len(raw) // 2])
    elif kind == "zstd":
        path = write_lines(folder / "a.jsonl.zst", conversations(2000))
        path.write_bytes(path.read_bytes()[:-3])
    elif kind == "parquet":
        path = write_parquet(folder / "a.parquet", conversations(50))
        data = bytearray(path.read_bytes())
        data[20:120] = bytes(100)
        path.write_bytes(data)
    elif kind == "list":
        path = folder / "a.json"
        path.write_text('[{"text": "the cat"},\n {"text": "sat"}\n {"text": "on"}]')
    else:
        path = folder / "a.json"
        path.write_text('[{"text": "the cat"},\n {"text": "sa')
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gzip", r"a\.jsonl\.gz: after line \d+: cannot be read: Truncated compressed stream"),
        ("zstd", r"a\.jsonl\.zst: after line \d+: cannot be read: Truncated compressed stream"),
        ("parquet", r"a\.parquet: row \d+: cannot be read as Parquet"),
        ("list", r"a\.json: line 3: expected ',' or '\]' after an object, got '\{'"),
        ("cut list", r"a\.json: line 2, column \d+: expected a JSON object, got a broken one: Unterminated"),
    ],
)
def test_a_damaged_file_is_not_read_to_its_damage(prepared: Any, tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(spoiled(tmp_path, kind))


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, r"data\.train\.0: .*a\.jsonl: expected records, got none: it is empty"),
        ([{"question": "a"}], {}, r"line 1: expected the columns of a data\.format .*, got \['question'\]"),
        ([{"text": "a", **GOOD}], {}, r"line 1: the columns .* fit text and messages: name one as data\.format"),
        ([GOOD], {"format": "alpaca"}, r"line 1: expected the columns instruction, output of the format 'alpaca'"),
        ([{"text": ""}], {}, r"line 1: expected tokens to learn, got none in 1"),
        ([{"prompt": "a", "completion": ""}], {"tokenizer": "no"}, r"data\.tokenizer: expected a Hugging Face"),
        ([{"prompt": "a", "completion": [MESSAGE]}], {}, r"line 1: expected prompt and completion to be both"),
        ([GOOD], {"tokenizer": None}, r"data\.tokenizer: expected the tokenizer of the model that is tuned, got none"),
        ([GOOD], {"chat_template": "no.jinja"}, r"data\.chat_template: no\.jinja cannot be read"),
        ([{"text": "a"}] * 3, {"chat_template": "no"}, r"data\.chat_template: expected records with messages"),
        ([GOOD] * 2, {}, r"data\.train: .*a\.jsonl: expected examples to train on, got none: .* held out"),
        ([GOOD, {"messages": [{**MESSAGE, "content": "the " * 90}, ANSWER]}], {"sequence_length": 32},
         r"line 2: expected tokens to learn among the first 32 of data\.sequence_length, got none: it has \d+"),
        ([GOOD] * 2, {"sequence_length": 4, "too_long": "drop"}, r"all its 2 examples are longer than data\.seq"),
    ],
)  # fmt: skip
def test_bad_sources_are_named(prepared: Any, tmp_path: Path, records: Any, options: Any, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", records)
    if "sequence_length" in options:
        options["validation"] = [str(path)]
    with pytest.raises(DataError, match=message):
        prepared(path, **options)


def test_a_template_without_marks_or_none_at_all(prepared: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GOOD] * 3)
    plain = str(save_tokenizer(tmp_path / "plain", PLAIN_TEMPLATE))
    with pytest.raises(DataError, match=r"its chat template has no generation marks.*name it as data\.chat_template"):
        prepared(path, tokenizer=plain, validation=[str(path)])
    bare = str(save_tokenizer(tmp_path / "bare", None))
    with pytest.raises(DataError, match="expected a tokenizer with a chat template for messages, got none"):
        prepared(path, tokenizer=bare, validation=[str(path)])
    (tmp_path / "marks.jinja").write_text(TEMPLATE)
    given = prepared(path, tokenizer=bare, validation=[str(path)], chat_template=str(tmp_path / "marks.jinja"))
    assert rows(given.train) == rows(prepared(path, validation=[str(path)]).train)
    # What is exported goes on with the template that was trained with.
    assert "generation" in (given.tokenizer / "chat_template.jinja").read_text()
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{{ raise_exception('no system here') }}{% generation %}{% endgeneration %}")
    with pytest.raises(DataError, match="line 1: the chat template refuses it: no system here"):
        prepared(path, validation=[str(path)], chat_template=str(refusing))


def test_the_cache_follows_records_format_and_template(prepared: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", conversations(20))
    first = prepared(path)
    tokens = next((tmp_path / "cache" / "examples").glob("*/tokens.bin"))
    stamp = tokens.stat().st_mtime_ns
    assert prepared(path).fingerprint == first.fingerprint
    assert tokens.stat().st_mtime_ns == stamp
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("<|", "< |"))
    others = [prepared(path, chat_template=str(tmp_path / "other.jinja")), prepared(path, sequence_length=60)]
    others += [prepared(path, packing=True), prepared(write_lines(path, conversations(21)))]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_keys_of_records_are_refused_for_text(prepared: Any, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.packing: expected records"):
        prepare(DataBlock.model_validate({"train": [str(corpus / "csv.txt")], "packing": True}))
    path = write_lines(tmp_path / "a.jsonl", conversations(20))
    with pytest.raises(DataError, match=r"csv\.txt: expected records .*, as other sources"):
        prepared([str(path), str(corpus / "csv.txt")])


def test_weights_are_shares_and_each_source_has_epochs_of_its_own(prepared: Any, tmp_path: Path) -> None:
    few, many = (
        write_lines(tmp_path / f"{name}.jsonl", conversations(n, n)) for name, n in (("few", 20), ("many", 60))
    )
    held = [str(write_lines(tmp_path / "v.jsonl", conversations(5)))]
    sources = [{"path": str(few), "name": "few", "weight": 3}, {"path": str(many), "name": "many", "weight": 1}]
    mixture = prepared(sources, validation=held).train
    order = mixture.order(np.arange(160), seed=1)
    # 80 samples an epoch, of which 60 are the few's, thrice each.
    assert np.bincount(order[:80] < 20).tolist() == [20, 60]
    assert np.bincount(order[order < 20]).tolist() == [6] * 20
    of_many = order[order >= 20] - 20
    assert sorted(of_many[:20].tolist()) != sorted(of_many[20:40].tolist())
    assert len(set(of_many.tolist())) == 40
    assert mixture.order(np.arange(100, 160), seed=1).tolist() == order[100:].tolist()
    assert mixture.order(np.arange(160), seed=2).tolist() != order.tolist()
    assert abs(int((order[:40] < 20).sum()) - 30) < 10
    plain = prepared([{"path": source["path"]} for source in sources], validation=held).train
    assert sorted(plain.order(np.arange(80), seed=1).tolist()) == list(range(80))
    for change, message in (
        ({"weight": None}, r"data\.train\.1\.weight: expected one, as other sources have, got none"),
        ({"name": "few"}, r"data\.train: expected sources with different names, got two called 'few'"),
    ):
        with pytest.raises(DataError, match=message):
            prepared([sources[0], {**sources[1], **change}], validation=held)


def test_a_package_that_is_missing_is_named(prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {"pyarrow.parquet": write_parquet(tmp_path / "a.parquet", conversations(3))}
    paths |= {"pyarrow": write_lines(tmp_path / "a.jsonl.gz", conversations(3))}
    paths |= {"datasets": write_dataset(tmp_path / "saved", conversations(3))}
    for module, path in paths.items():
        monkeypatch.setitem(sys.modules, module, None)
        top = module.partition(".")[0]
        with pytest.raises(
            DataError, match=rf"expected the package {top} to read it.*pip install 'narrowgauge\[data\]'"
        ):
            prepared(path)
    found = prepared(write_lines(tmp_path / "plain.jsonl", conversations(30)))
    assert len(found.train) == 29


def test_a_folder_of_splits_is_told_to_name_one(prepared: Any, tmp_path: Path) -> None:
    import datasets

    split = datasets.Dataset.from_list(conversations(30))
    datasets.DatasetDict({"test": split, "train": split}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(
        DataError, match=r"saved: expected one split, got \['test', 'train'\]; name one: '.*saved/test'"
    ):
        prepared(tmp_path / "saved")
    assert len(prepared(tmp_path / "saved" / "train").train) == 29


def test_memory_does_not_grow_with_the_data(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's and NumPy's own, beyond windows that are made small here; what is mapped is the machine's to hold."""
    monkeypatch.setattr(layout, "_TOKENS", 1 << 14)
    monkeypatch.setattr(layout, "_WINDOW", 1 << 8)
    monkeypatch.setattr(encode, "_BATCH_RECORDS", 8)
    for module in (cache, corpus):
        monkeypatch.setattr(module, "_CHUNK", 1 << 14)
    text, peaks = " ".join(record["messages"][-1]["content"] for record in conversations(150)), []
    for count in (10, 30, 300):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(count))
        block = {"train": [str(path)], "tokenizer": str(tokenizer), "cache_dir": str(tmp_path / "cache")}
        tracemalloc.start()
        found = prepare(DataBlock.model_validate({**block, "sequence_length": 64, "packing": True})).train
        assert isinstance(found, Mixture)
        found.micro_batch([0, len(found) - 1])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The first imports and compiles.
    assert found.sources[0].layout.counts.tokens * 8 > 1.5 * peaks[1]
    assert peaks[2] < 1.3 * peaks[1]
