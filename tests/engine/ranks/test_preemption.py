"""SIGTERM and SIGUSR1 in the middle of a run: saved at the step all ranks agree on, exit code 75, resumed bit-equal."""

import fcntl
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from narrowgauge.engine.ranks.exit_codes import EXIT_PREEMPTED
from tests.support import forked
from tests.support.command import Process, losses, records, start, tiny_config, under_megatron
from tests.support.forked import run

MORE = ["--set", "training.steps=60", "--set", "training.eval_interval=30", "--set", "training.checkpoint_interval=25"]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    result = run("train", str(tiny_config(corpus, folder)), *MORE, ranks=2)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def wait_until(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.002)


def ranks_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The process ranks under a launcher, in the order of their ranks."""
    found = [p for p in psutil.Process(process.pid).children() if "RANK" in p.environ()]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("step-*.tmp"))


def assert_same(found: Path, expected: Path) -> None:
    assert losses(found) == losses(expected)
    evaluations = [{r["step"]: r["eval_loss"] for r in records(d) if "eval_loss" in r} for d in (found, expected)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "training"),
        pytest.param(signal.SIGUSR1, "training", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "saving", marks=pytest.mark.slow),
    ],
)
def test_one_rank_is_asked_and_all_save_and_end(
    corpus: Path, tmp_path: Path, whole: Path, number: signal.Signals, moment: str
) -> None:
    config, run_dir = str(tiny_config(corpus, tmp_path)), tmp_path / "run"
    process = start("train", config, *MORE, ranks=2)
    if moment == "training":
        wait_until(lambda: any(step >= 26 for step in losses(run_dir)), process)
    else:
        wait_until(lambda: is_saving(run_dir), process)
    asked = ranks_of(process)
    family = psutil.Process(process.pid).children(recursive=True)
    asked[1].send_signal(number)
    asked[1].send_signal(number)
    assert process.wait(60) != 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    reached = max(losses(run_dir))
    assert reached < 60
    assert saved_steps(run_dir)[-1] == reached
    assert not is_saving(run_dir)
    assert run("train", config, *MORE, ranks=2).returncode == 0
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_under_megatron_both_stages_save_and_go_on(corpus: Path, tmp_path: Path) -> None:
    config, run_dir = str(tiny_config(corpus, tmp_path, **under_megatron(pipeline_parallel=2))), tmp_path / "run"
    process = start("train", config, *MORE, ranks=2)
    wait_until(lambda: any(step >= 26 for step in losses(run_dir)), process)
    ranks_of(process)[1].send_signal(signal.SIGUSR1)
    assert process.wait(60) != 0
    reached = max(losses(run_dir))
    assert reached < 60
    assert saved_steps(run_dir)[-1] == reached
    assert run("train", config, *MORE, ranks=2).returncode == 0
    whole = tmp_path / "whole"
    assert run("train", config, *MORE, "--set", f"logging.run_dir={whole}", ranks=2).returncode == 0
    assert_same(run_dir, whole)


def test_the_exit_code_is_its_own_and_the_message_says_what_to_do(corpus: Path, tmp_path: Path) -> None:
    process = forked.start("train", str(tiny_config(corpus, tmp_path)), *MORE)
    wait_until(lambda: any(losses(tmp_path / "run")), process)
    # As `timeout` and SLURM do: to the whole group, data loader workers too.
    (rank,) = map(psutil.Process, process.pids)
    for member in [rank, *rank.children(recursive=True)]:
        member.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_PREEMPTED == 75
    reached = max(losses(tmp_path / "run"))
    assert process.said()[1].splitlines()[-1] == (
        f"asked to end: saved after step {reached} of 60; the same command goes on from there"
    )


@pytest.mark.slow
def test_asked_again_and_again_at_random_moments(corpus: Path, tmp_path: Path) -> None:
    config, run_dir, dice = str(tiny_config(corpus, tmp_path)), tmp_path / "run", random.Random(0)
    words, whole = [*MORE, "--set", "training.steps=120"], tmp_path / "whole"
    assert run("train", config, *words, "--set", f"logging.run_dir={whole}", ranks=2).returncode == 0
    interruptions = 0
    for _ in range(12):
        before = max(losses(run_dir), default=0)
        process = start("train", config, *words, ranks=2)
        deadline = time.monotonic() + 120
        while process.poll() is None and max(losses(run_dir), default=0) <= before:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(dice.uniform(0.0, 0.4))
        if process.poll() is None:
            for member in ranks_of(process):
                if member.is_running() and dice.random() < 0.7:
                    os.kill(member.pid, dice.choice([signal.SIGTERM, signal.SIGUSR1]))
        if process.wait(90) == 0:
            break
        interruptions += max(losses(run_dir)) < 120
    else:
        assert run("train", config, *words, ranks=2).returncode == 0
    assert interruptions >= 3
    assert_same(run_dir, whole)


def test_before_the_first_step_a_signal_ends_at_once(corpus: Path, tmp_path: Path) -> None:
    """While it waited for another process that compiles, SIGTERM was noted and nothing looked at the note; then the
    rank ended, and where no launcher was the other stayed.
    """
    with (tmp_path / "narrowgauge.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        config = str(tiny_config(corpus, tmp_path))
        process = forked.start("train", config, ranks=2, TORCH_EXTENSIONS_DIR=str(tmp_path))
        wait_until(lambda: process.said()[0].count("waiting for another process") == 2, process)
        os.kill(process.pids[1], signal.SIGTERM)
        deadline = time.monotonic() + 30
        while None in process.exit_codes and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.exit_codes == [1, EXIT_PREEMPTED]
    reason = "asked to end (SIGTERM) before the first step: nothing to save"
    first, second = process.said()[1].splitlines()
    assert first == f"process rank 1: {reason}"
    assert second.startswith("error: process rank 0 on ")
    assert second.endswith(f": {reason}")
