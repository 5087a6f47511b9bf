"""``narrowgauge launch`` on one machine: signals, exit codes, and nothing left behind."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.command import losses, run, start, tiny_config, wait_for_step

HERE = ["--set", "launch.processes_per_node=2", "--set", "launch.threads_per_process=1"]
LONG = ["--set", "training.steps=2000"]


def plain_config(corpus: Path, folder: Path) -> str:
    """Without DeepSpeed, whose import in each process is a third of what these cost."""
    path = tiny_config(corpus, folder, engine="ddp")
    config = json.loads(path.read_text())
    del config["zero_optimization"]
    path.write_text(json.dumps(config))
    return str(path)


def start_in_terminal(*words: str, stderr: Any = subprocess.DEVNULL) -> "subprocess.Popen[str]":
    """As a shell does that is not under nohup, where SIGHUP is ignored: whom we start inherits that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        return start(*words, stderr=stderr)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_of_all_kinds_save_once_and_leave_nothing(corpus: Path, tmp_path: Path) -> None:
    config, run_dir = str(tiny_config(corpus, tmp_path)), tmp_path / "run"
    with (tmp_path / "stderr").open("w") as stderr:
        process = start_in_terminal("launch", config, *HERE, *LONG, stderr=stderr)
    wait_for_step(run_dir, 6, process)
    family = psutil.Process(process.pid).children(recursive=True)
    agent = psutil.Process(process.pid).children()[0]
    # As a terminal does that is closed: it ended ``launch`` alone.
    process.send_signal(signal.SIGHUP)
    time.sleep(0.05)
    # As a scheduler does that signals all processes, some of them twice.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        agent.send_signal(number)
        time.sleep(0.05)
    assert process.wait(60) == 75, (tmp_path / "stderr").read_text()
    assert not [member for member in family if member.is_running()]
    reached = max(losses(run_dir))
    assert reached < 2000
    assert (run_dir / "checkpoints" / f"step-{reached}").is_dir()
    assert "Traceback" not in (tmp_path / "stderr").read_text()


@pytest.mark.slow
def test_a_closed_terminal_saves_and_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    """SIGHUP ended ``launch`` alone: torchrun and its ranks went on."""
    config, run_dir = plain_config(corpus, tmp_path), tmp_path / "run"
    process = start_in_terminal("launch", config, *HERE, *LONG)
    wait_for_step(run_dir, 3, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 75
    assert not [member for member in family if member.is_running()]
    assert (run_dir / "checkpoints" / f"step-{max(losses(run_dir))}").is_dir()


def test_ranks_do_not_outlive_a_killed_agent(corpus: Path, tmp_path: Path) -> None:
    process = start("launch", plain_config(corpus, tmp_path), *HERE, *LONG)
    wait_for_step(tmp_path / "run", 6, process)
    family = psutil.Process(process.pid).children(recursive=True)
    psutil.Process(process.pid).children()[0].kill()
    assert process.wait(30) == 1
    assert not [member for member in family if member.is_running()]


def test_bad_input_that_only_the_ranks_find(corpus: Path, tmp_path: Path) -> None:
    result = run("launch", plain_config(corpus, tmp_path), *HERE, "--set", 'data.train=["gone.txt"]')
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert "data.train: 'gone.txt' names no file" in result.stderr
    assert "Traceback" not in result.stderr
