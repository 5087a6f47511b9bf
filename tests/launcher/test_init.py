"""``narrowgauge init``: a first configuration, which fits."""

import io
import json
from pathlib import Path

import pytest

from narrowgauge.engine.config.config import load_config
from tests.launcher.conftest import Call


@pytest.mark.slow
def test_flags_make_a_configuration_that_fits(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "config.json"
    words = ["init", "--out", str(out), "--model", "llama-60m", "--data", "stdlib", "--gpus", "2", "--gpu", "l4-24"]
    result = call(*words)
    assert result.returncode == 0, result.stderr
    config = load_config(out)
    batches = config.batches(2)
    assert batches.total == 64
    assert config.raw["model"]["preset"] == "llama-60m"
    assert config.raw["data"]["train"] == "stdlib"
    # A model of 60 million parameters leaves room for large micro-batches, and nothing has to be computed twice.
    assert config.raw["model"]["gradient_checkpointing"] == "none"
    assert batches.micro > 1
    told = call("plan", str(out), "--gpus", "2", "--gpu", "l4-24", "--json")
    assert json.loads(told.stdout)["fits"]
    assert "expected a file that is not there yet" in call(*words).stderr
    changed = {str(out): str(tmp_path / "elsewhere.json"), "stdlib": "no/*.txt"}
    elsewhere = [*(changed.get(word, word) for word in words), "--tokenizer", "no/tokenizer"]
    said = call(*elsewhere).stdout
    assert "warning: --data: 'no/*.txt' names no file on this machine" in said
    assert "warning: --tokenizer: nothing is at no/tokenizer on this machine" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "stdlib", "--gpus", "2"], "--model: expected it, or a terminal to ask on, got neither"),
        (["--model", "llama-8b", "--data", "stdlib", "--gpus", "2", "--gpu", "l4-24"], "'llama-8b'; did you mean"),
        (["--model", "llama-60m", "--data", "stdlib", "--gpus", "2", "--gpu", "l4-2"], "did you mean 'l4-24'?"),
        (["--model", ""], "--model: expected a Hugging Face folder or one of llama-130m, llama-13b, "),
        (["--model", "/no/such"], "llama-7b, got '/no/such'"),
        (["--model", "llama-60m", "--data", ""], "--data: expected files, globs or stdlib, got ''"),
        (["--model", "llama-60m", "--data", "stdlib", "--data", "a"], "--data: expected stdlib alone or files, got st"),
        (["--model", "llama-60m", "--data", "a", "--tokenizer", ""], "--tokenizer: expected a folder, got ''"),
        (["--out", "/no/such/folder/config.json"], "--out: expected a file in a folder that is there, got /no/such"),
    ],
)
def test_answers_that_do_not_hold(call: Call, tmp_path: Path, words: list[str], message: str) -> None:
    given = words if "--out" in words else ["--out", str(tmp_path / "config.json"), *words]
    result = call("init", *given)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "config.json").exists()


def test_questions_are_asked_again_until_they_are_answered(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number of GPUs below 1 divided by zero later."""
    answers = io.StringIO("llama-60m\nstdlib\n0\nmany\n2\nl4-2\n")
    monkeypatch.setattr(answers, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", answers)
    result = call("init", "--out", str(tmp_path / "config.json"))
    assert result.stdout.count("GPUs of each machine") == 3
    assert "expected at least 1, got 0" in result.stdout
    assert result.returncode == 2
    assert "did you mean 'l4-24'?" in result.stderr
