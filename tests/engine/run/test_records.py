"""``narrowgauge train`` and ``data`` on records."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from narrowgauge.engine.config.run_blocks import DataBlock
from narrowgauge.engine.data.run_data import prepare
from tests.launcher.conftest import Call
from tests.launcher.conftest import call as call
from tests.support import forked
from tests.support.chat import (
    PLAIN_TEMPLATE,
    conversations,
    save_tokenizer,
    write_dataset,
    write_lines,
    write_parquet,
)
from tests.support.command import losses, tiny_config

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 conversations, of three kinds of files."""
    folder, records = tmp_path_factory.mktemp("records"), conversations(200)
    save_tokenizer(folder / "tokenizer")
    write_lines(folder / "a.jsonl", records)
    write_parquet(folder / "a.parquet", records)
    write_dataset(folder / "saved", records)
    return folder


def config_of(folder: Path, target: Path, **data: Any) -> dict[str, Any]:
    config = json.loads(tiny_config(folder, target, engine="ddp", zero_optimization={"stage": 0}).read_text())
    config["model"]["config"]["max_position_embeddings"] = 64
    block = {"train": [str(folder / "a.jsonl")], "tokenizer": str(folder / "tokenizer"), "sequence_length": 64}
    config["data"] = {**block, "cache_dir": str(folder / "cache"), **data}
    config["training"] |= {"steps": 6, "checkpoint_interval": 3, "eval_interval": 3}
    return config


def train(config: dict[str, Any], target: Path, ranks: int, *overrides: str) -> dict[int, float]:
    (target / "config.json").write_text(json.dumps(config))
    words = [word for override in overrides for word in ("--set", override)]
    result = forked.run("train", str(target / "config.json"), *words, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return losses(target / "run")


def test_kinds_of_files_ranks_and_resumed_runs_have_equal_losses(folder: Path, tmp_path: Path) -> None:
    """JSON Lines on two ranks, Parquet on one, a folder of datasets on one and from the middle on two."""
    found, summaries = [], []
    for name, ranks, parts in (("a.jsonl", 2, (6,)), ("a.parquet", 1, (6,)), ("saved", 1, (3, 6))):
        target = tmp_path / name
        target.mkdir()
        config = config_of(folder, target, train=[str(folder / name)], packing=True)
        curve: dict[int, float] = {}
        for number, steps in enumerate(parts):
            # The schedule's length is the run's.
            config["training"]["lr_schedule"] = {"type": "constant"}
            curve = train(config, target, ranks + number, f"training.steps={steps}")
        found.append(curve)
        summaries.append(json.loads((target / "run" / "summary.json").read_text()))
    assert list(found[0]) == [1, 2, 3, 4, 5, 6]
    assert found[0][6] < found[0][1]
    for curve, summary in zip(found[1:], summaries[1:], strict=True):
        assert curve == pytest.approx(found[0], abs=1e-6)
        assert summary["eval_loss"] == pytest.approx(summaries[0]["eval_loss"], abs=1e-6)
    counts = summaries[0]["data"][str(folder / "a.jsonl")]
    assert (counts["examples"], counts["dropped"]) == (196, 0)
    assert counts["truncated"] == sum(length > 64 for length in lengths(folder)) > 0
    assert summaries[0]["tokens"] == 6 * round(8 * counts["tokens"] / counts["samples"])


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_tensor_parallel_runs_have_the_losses_of_ddp(folder: Path, tmp_path: Path, packing: bool) -> None:
    found = []
    for engine, ranks in (("ddp", 1), ("megatron", 2)):
        target = tmp_path / engine
        target.mkdir()
        config: dict[str, Any] = {**config_of(folder, target, packing=packing), "engine": engine}
        config["optimizer"]["params"]["strata"] = 2
        if engine == "megatron":
            config["megatron"] = {"tensor_parallel": 2, "sequence_parallel": True}
        curve = train(config, target, ranks)
        found.append((curve, json.loads((target / "run" / "summary.json").read_text())["eval_loss"]))
    (curve, evaluated), (other, other_evaluated) = found
    assert other == pytest.approx(curve, abs=1e-6)
    assert other_evaluated == pytest.approx(evaluated, abs=1e-6)


def lengths(folder: Path) -> list[int]:
    """Tokens of the examples that are trained on, from the cache."""
    from narrowgauge.engine.data.examples import PreparedExamples

    block = config_of(folder, folder)["data"] | {"sequence_length": 1000}
    found = prepare(DataBlock.model_validate(block))
    assert isinstance(found, PreparedExamples)
    return [len(found.train.sources[0].spans(sample)[0][0]) for sample in range(len(found.train))]


@pytest.mark.slow
def test_epochs_are_as_many_steps_as_see_every_sample(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path)
    config["training"] = {"epochs": 0.5}
    curve = train(config, tmp_path, 1)
    assert len(curve) == 13  # 196 / 2 samples, 8 a step
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 13


def test_data_shows_what_is_learned(folder: Path, tmp_path: Path, call: Call) -> None:
    config = config_of(folder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = call("data", str(tmp_path / "config.json"))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.startswith("sample ") for line in lines) == 10
    said = {record["messages"][-1]["content"] for record in conversations(200)}
    shown = "".join(lines)
    assert sum(f"<|assistant|>[{text}<|eos|>]" in shown for text in said) >= 5
    assert "<|user|>[" not in shown
    row = next(line for line in lines if "│" in line and "196" in line)
    assert [cell.strip() for cell in row.split("│")][2:4] == ["196", "196"]
    truncated = sum(length > 64 for length in lengths(folder))
    assert f"{truncated / 196:.1%} truncated" in row
    assert not (tmp_path / "run").exists()
    text = call("data", "quickstart", "--set", f"data.cache_dir={tmp_path}/none", "--set", 'data.train=["none.txt"]')
    assert text.returncode == 2
    assert "data.train: 'none.txt' names no file" in text.stderr


def test_a_model_from_a_folder_is_trained_with_the_tokenizer_that_lies_there(
    folder: Path, tmp_path: Path, call: Call
) -> None:
    """Without ``data.tokenizer`` one was trained on texts, whose tokens are not the model's, and nothing was said."""
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    described = LlamaConfig(vocab_size=320, num_attention_heads=4, max_position_embeddings=64, **shape)
    base = tmp_path / "base"
    LlamaForCausalLM(described).save_pretrained(str(base))
    config = config_of(folder, tmp_path, tokenizer=None)
    config["model"], config["training"]["steps"] = {"path": str(base)}, 1
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "the cat sat on the mat"}] * 4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = [f'data.train=["{texts}"]', f'data.validation=["{texts}"]', "data.vocab_size=270"]
    said = call("data", str(tmp_path / "config.json"), *(word for change in words for word in ("--set", change)))
    assert said.returncode == 0, said.stderr
    assert f"{base} holds no tokenizer, and data.tokenizer names none" in " ".join(said.stdout.split())
    save_tokenizer(base)
    result = forked.run("train", str(tmp_path / "config.json"))
    assert result.returncode == 0, result.stderr
    assert f"data.tokenizer: that of the model, {base}" in " ".join(result.stdout.split())
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert resolved["resolved"]["data"]["tokenizer"] == str(base)
    named = {**config["data"], "tokenizer": str(base)}
    assert resolved["data_fingerprint"] == prepare(DataBlock.model_validate(named)).fingerprint
    assert (tmp_path / "run" / "tokenizer" / "chat_template.jinja").is_file()


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        ({"train": ["{0}/broken.jsonl"]}, [], "broken.jsonl: line 2, column 15: expected a JSON object, got a broken"),
        ({"tokenizer": "{0}/plain"}, [], "its chat template has no generation marks, which say what"),
        ({"sequence_length": 65}, [], "data.sequence_length: expected at most the model's 64 tokens, got 65"),
        ({"packing": True}, ['model={"config": {"model_type": "bloom", "hidden_size": 32, "n_head": 4, "n_layer": 1}}'],
         "data.packing: expected false with a bloom, got true"),
        ({"train": [{"path": "{0}/a.jsonl", "wieght": 1}]}, [], "data.train.0.wieght: unknown key; did you mean 'we"),
        ({}, ["training.epochs=2"], "training: expected one of 'steps' and 'epochs', got both"),
    ],
)  # fmt: skip
def test_bad_input_ends_before_anything_starts(
    folder: Path, tmp_path: Path, call: Call, data: dict[str, Any], overrides: list[str], message: str
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n{"messages": [}\n')
    write_lines(tmp_path / "a.jsonl", conversations(4))
    save_tokenizer(tmp_path / "plain", PLAIN_TEMPLATE)
    raw = json.dumps(config_of(folder, tmp_path, **data)).replace("{0}", str(tmp_path))
    (tmp_path / "config.json").write_text(raw)
    words = [word for override in overrides for word in ("--set", override)]
    result = call("train", str(tmp_path / "config.json"), *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
