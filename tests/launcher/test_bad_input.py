"""Bad input ends with one clear error and exit code 2, before any process group exists, on every rank."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowgauge.launcher.main import main
from tests.launcher.conftest import Call
from tests.support import forked
from tests.support.command import run, tiny_config


@pytest.fixture
def refuse(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process with overrides that must be refused; gives the one line it says."""

    def attempt(*overrides: str) -> str:
        config = tiny_config(corpus, tmp_path)
        words = [word for override in overrides for word in ("--set", override)]
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "0")
            monkeypatch.delenv(name)
        monkeypatch.setattr(sys, "argv", ["narrowgauge", "train", str(config), *words])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        assert not torch.distributed.is_initialized()
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return attempt


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gradient_cliping=1", "gradient_cliping: unknown key; did you mean 'gradient_clipping'?"),
        ("zero_optimization.offload_optimizer.devise=cpu", "devise: unknown key; did you mean 'device'?"),
        ("data.sequence_length=long", 'data.sequence_length: expected a valid integer, got "long"'),
        ("optimizer.params.density=1.5", "optimizer.params.density: expected a number in (0, 1] or None, got 1.5"),
        ('optimizer.params={"rank": 33}', "rank: 33 is above the 32 columns (in_features) of 'model.layers.0."),
        ('optimizer.params.target_modules=["*.query"]', "'*.query' matches no nn.Linear. The model's linears: model."),
        ('data.train=["missing/*.txt"]', "data.train: 'missing/*.txt' names no file"),
        ("data.sequence_length=64", "data.sequence_length: expected at most the model's 32 tokens, got 64"),
        ("logging.run_dir=/proc/run", "logging.run_dir: /proc/run cannot be written"),
        (f"logging.run_dir={'x' * 300}", "logging.run_dir: [Errno 36] File name too long"),
        ("fp16.enabled=true", "fp16.enabled: does not work with Grass: fp16 loss scaling is not supported, use bf16"),
        ("train_batch_size=7", "train_batch_size: expected train_micro_batch_size_per_gpu (3) x"),
        ("model.config.hiden_size=3", "model.config.hiden_size: unknown key for llama; did you mean 'hidden_size'?"),
        ('model={"preset": "llama-2t"}', "'llama-7b'], got 'llama-2t'; did you mean 'llama-7b'?"),
        ('model={"path": "nowhere"}', "model.path: expected a Hugging Face folder on this machine, got 'nowhere'"),
        ('model.config.hidden_size="x"', "model.config.hidden_size: expected a whole number, got 'x'"),
        ("model.config.num_attention_heads=5", "num_attention_heads: expected a divisor of hidden_size, 32, got 5"),
        ("model.config.num_attention_heads=0", "model.config: ZeroDivisionError"),
        ("model.config.hidden_act=foo", "transformers cannot build this llama: KeyError: 'foo'"),
        (
            'training.lr_schedule={"type": "wsd", "decay_steps": 13}',
            "lr_schedule: expected at most training.steps, 12, as warmup_steps and decay_steps together, got 0",
        ),
        ("training.sample_prompt=", "training.sample_prompt: expected at least one token, got ''"),
        ('optimizer.params.param_groups=[{"params": ["no"]}]', "param_groups[0]: ['no'] matches no trainable"),
        ("managed_gradient_accumulation=false", "managed_gradient_accumulation: expected true, got false"),
        ("training.steps=0", "training.steps: expected greater than 0, got 0"),
    ],
)  # fmt: skip
def test_each_is_one_line_that_names_it(refuse: Any, override: str, message: str) -> None:
    assert message in refuse(override)


def test_blocks_that_are_missing_are_named(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"train_batch_size": 2}))
    result = call("train", str(path))
    assert result.returncode == 2
    for block in ("model", "data", "training", "logging", "optimizer"):
        assert f"{path}: {block}: expected this block, got none" in result.stderr


def test_token_files_that_disagree(refuse: Any, tmp_path: Path) -> None:
    from narrowgauge.engine.data.tokens import write_tokens

    write_tokens(tmp_path / "a", [[1] * 500], vocab_size=100)
    os.truncate(tmp_path / "a.bin", 900)
    message = refuse(f'data.train=["{tmp_path}/a"]')
    assert f"{tmp_path}/a.bin has 900 bytes, {tmp_path}/a.idx describes 1000: they do not match" in message


def test_data_shorter_than_a_sample(refuse: Any, tmp_path: Path) -> None:
    from narrowgauge.engine.data.tokens import write_tokens

    write_tokens(tmp_path / "a", [[1] * 20, [1] * 20], vocab_size=100)
    message = refuse(f'data={{"train": ["{tmp_path}/a"], "sequence_length": 32}}', "model.config.vocab_size=100")
    assert "a.bin: expected at least the 32 tokens of one data.sequence_length, got 1" in message


def test_an_error_of_all_ranks_is_told_once_and_stops_all(corpus: Path, tmp_path: Path) -> None:
    """In processes of their own, whose debug log would show a process group."""
    config = str(tiny_config(corpus, tmp_path))
    override = 'optimizer.params.target_modules=["*.query"]'
    result = run("train", config, "--set", override, ranks=2, TORCH_CPP_LOG_LEVEL="INFO")
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "'*.query' matches no nn.Linear" in result.stderr
    assert "ProcessGroup" not in result.stdout + result.stderr


RANK_SCRIPT = """
import os, sys
import torch.distributed
from narrowgauge.launcher.main import main
torch.distributed.init_process_group = lambda *args, **kwargs: print("ProcessGroup", file=sys.stderr)
if os.environ["RANK"] == "1":
    sys.argv += ["--set", sys.argv.pop()]
else:
    sys.argv.pop()
main()
"""


def run_with_another_rank_1(folder: Path, config: Path, override: str) -> "subprocess.CompletedProcess[str]":
    script = folder / "rank.py"
    script.write_text(RANK_SCRIPT)
    return forked.python(str(script), "train", str(config), override, ranks=2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.params.lr=0.1", "config.optimizer.params.lr: process rank 0 has 0.005, rank 1 has 0.1"),
        ('data.train=["gone.txt"]', "process rank 1: data.train: 'gone.txt' names no file"),
        ("gradient_cliping=1", "gradient_cliping: unknown key"),
    ],
)  # fmt: skip
def test_a_rank_that_differs_or_fails_takes_the_others_with_it(
    corpus: Path, tmp_path: Path, override: str, message: str
) -> None:
    """No rank waits for one that has left: seconds, not the process group's timeout."""
    config = tiny_config(corpus, tmp_path)
    # The start of the forks' server is not the ranks'.
    forked.python("-c", "pass")
    begin = time.monotonic()
    result = run_with_another_rank_1(tmp_path, config, override)
    assert time.monotonic() - begin < 60
    assert result.returncode != 0
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "ProcessGroup" not in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_configuration_in_the_run_folder(corpus: Path, tmp_path: Path) -> None:
    config = str(tiny_config(corpus, tmp_path))
    assert forked.run("train", config, "--set", "training.steps=2").returncode == 0
    result = forked.run("train", config, "--set", "training.steps=4", "--set", "optimizer.params.lr=0.1")
    assert result.returncode == 2
    assert "holds a run of another configuration: optimizer.params.lr (was 0.005, now 0.1)" in result.stderr


def test_help_is_quick() -> None:
    """In seconds of the processor, best of three: the machine may be busy, the imports are what is tested."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert result.returncode == 0
        assert "train" in result.stdout
    assert min(seconds) < 0.7
