"""The watchdog: ranks that get no further are ended, named, and started again where that is asked for."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support import forked
from tests.support.command import losses, start, tiny_config, wait_for_step
from tests.support.forked import run

# Seconds; a loaded machine must make its engine and evaluate within it.
LIMIT = 20
FEW = ["--set", f"training.hang_timeout={LIMIT}", "--set", "training.steps=200"]
TWO_HERE = ["--set", "launch.processes_per_node=2", "--set", "launch.threads_per_process=1"]


def rank_process(process: "subprocess.Popen[str]", rank: int) -> psutil.Process:
    """The process of a rank; its children have its environment too."""
    family = psutil.Process(process.pid).children(recursive=True)
    return next(member for member in family if member.environ().get("RANK") == str(rank))


def stacks(run_dir: Path, rank: int) -> str:
    (path,) = (run_dir / "stacks").glob(f"rank-{rank}-{socket.gethostname()}-*.txt")
    return path.read_text()


@pytest.mark.slow
def test_a_rank_that_does_nothing_is_named_and_the_run_starts_again(corpus: Path, tmp_path: Path) -> None:
    config, run_dir = str(tiny_config(corpus, tmp_path)), tmp_path / "run"
    alone = tmp_path / "alone"
    assert run("train", config, *FEW, "--set", f"logging.run_dir={alone}", ranks=2).returncode == 0
    more = ["--set", "launch.max_restarts=1", "--set", "launch.shutdown_timeout=3"]
    with (tmp_path / "stderr").open("w") as stderr:
        process = start("launch", config, *FEW, *TWO_HERE, *more, stderr=stderr)
        wait_for_step(run_dir, 20, process)
        rank_process(process, 1).send_signal(signal.SIGSTOP)
        assert process.wait(180) == 0, (tmp_path / "stderr").read_text()
    text = (tmp_path / "stderr").read_text()
    assert f"error: process rank 0 on {socket.gethostname()}: no progress for {LIMIT} s at " in text
    assert "no word of process rank 1: gone or stopped, or still within the limit" in text
    assert "engine/run/train.py" in stacks(run_dir, 0)
    assert len((run_dir / "starts.jsonl").read_text().splitlines()) == 2
    assert losses(run_dir) == losses(alone)


def test_a_rank_whose_data_does_not_come_is_told_from_those_that_wait_for_it(corpus: Path, tmp_path: Path) -> None:
    config, run_dir = str(tiny_config(corpus, tmp_path)), tmp_path / "run"
    process = forked.start("train", config, *FEW, "--set", "data.num_workers=1", ranks=2)
    wait_for_step(run_dir, 5, process)
    children = psutil.Process(process.pids[1]).children()
    (worker,) = (child for child in children if "resource_tracker" not in " ".join(child.cmdline()))
    worker.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert process.wait(LIMIT + 60) == 1
    assert time.monotonic() - begin < LIMIT + 15
    worker.send_signal(signal.SIGCONT)
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running()
    text, host = process.said()[1], socket.gethostname()
    assert f"behind the others: rank 1 on {host} at step " in text
    assert "waiting for data" in text.partition("behind the others")[2].splitlines()[0]
    for rank in (0, 1):
        assert "engine/run/train.py" in stacks(run_dir, rank)
    last = max(losses(run_dir))
    assert last < 200
    assert os.listdir(run_dir / "checkpoints")


def test_a_run_that_gets_on_leaves_no_stacks(corpus: Path, tmp_path: Path) -> None:
    config = str(tiny_config(corpus, tmp_path))
    assert run("train", config, "--set", f"training.hang_timeout={LIMIT}", ranks=2).returncode == 0
    assert list((tmp_path / "run" / "stacks").iterdir()) == []
