"""``narrowgauge slurm`` and the batch scripts on a real SLURM of two nodes."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import Slurm, missing
from tests.support.command import losses, records, tiny_config, under_megatron, wait_for_step
from tests.support.forked import run

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

LAUNCH: dict[str, Any] = {
    "processes_per_node": 1,
    "threads_per_process": 1,
    # Both nodes are this machine.
    "rendezvous_host": "127.0.0.1",
    "slurm": {"nodes": 2, "gpus-per-node": None, "cpus-per-task": 1, "mem": None, "time": 30},
}
# Longer than what a job of two minutes has when it is asked to end, which SLURM does 31 to 61 seconds after its start.
LONG = [
    word
    for key, value in (("steps", 500), ("checkpoint_interval", 100), ("eval_interval", 100))
    for word in ("--set", f"training.{key}={value}")
]


def submit(config: Path, folder: Path, *words: str, **launch: Any) -> str:
    """Submit with the log in ``folder``; returns the job's number."""
    done = run("slurm", "submit", str(config), "--set", f"launch.slurm.output={folder}/job.log", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def logs(folder: Path) -> str:
    """The job's log and its nodes'."""
    return "".join(path.read_text() for path in sorted(folder.glob("job*.log")))


def config_of(corpus: Path, folder: Path, **changes: Any) -> Path:
    slurm = {**LAUNCH["slurm"], **changes.pop("slurm", {})}
    return tiny_config(corpus, folder, launch={**LAUNCH, "slurm": slurm}, **changes)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks of this machine, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_config(corpus, folder)
    assert run("train", str(config), *LONG, ranks=2).returncode == 0
    return folder / "run"


def assert_same(found: Path, expected: Path) -> None:
    assert losses(found) == losses(expected)
    evaluations = [{r["step"]: r["eval_loss"] for r in records(d) if "eval_loss" in r} for d in (found, expected)]
    assert evaluations[0] == evaluations[1]


def test_a_job_of_two_nodes_trains_and_shows_its_progress(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    # The ranks have what the setup lines set.
    setup = ["export OF_THE_SETUP=$UNSET_BEFORE/cache", "mkdir -p " + str(tmp_path / "of-the-setup")]
    config = config_of(corpus, tmp_path, slurm={"setup": setup, "comment": "two words", "contiguous": True})
    number = submit(config, tmp_path)
    job = slurm.wait(number)
    assert job["JobState"] == "COMPLETED", logs(tmp_path)
    assert job["Comment"] == "two"
    assert (tmp_path / "of-the-setup").is_dir()
    assert "srun --nodes 2 --ntasks-per-node 1" in (tmp_path / "job.log").read_text()
    # Both nodes have this machine's name.
    assert "12 steps, 3,072 tokens" in (tmp_path / f"job-{socket.gethostname()}.log").read_text()
    alone = tmp_path / "alone"
    assert run("train", str(config), "--set", f"logging.run_dir={alone}", ranks=2).returncode == 0
    assert losses(tmp_path / "run") == losses(alone)
    shown = run("slurm", "status", str(config)).stdout
    for text in ("12 of 12", f"{losses(alone)[12]:.4f}", "restarts", "finished", number):
        assert text in shown


@pytest.mark.slow
@pytest.mark.parametrize("how", ["scancel --signal", "B:USR1@59", "B:10@59", "b:sigusr1@59"])
def test_asked_to_end_a_job_requeues_itself_and_resumes_bit_equal(
    slurm: Slurm, corpus: Path, tmp_path: Path, whole: Path, how: str
) -> None:
    """Of ``launch.slurm.signal`` every form that is accepted; others ended the job, or did not requeue it."""
    limit = {"time": 2, "signal": how} if "@" in how else {}
    config = config_of(corpus, tmp_path, slurm=limit)
    run_dir, words = tmp_path / "run", LONG
    if limit:
        # The signal comes within the first 61 s, and has to find a run that goes on.
        words, whole = [*LONG, "--set", "training.steps=2000"], tmp_path / "whole"
        alone = run("train", str(config), *words, "--set", f"logging.run_dir={whole}", ranks=2)
        assert alone.returncode == 0, alone.stderr
    number = submit(config, tmp_path, *words)
    if how == "scancel --signal":
        wait_for_step(run_dir, 20)
        assert slurm.run("scancel", "--signal=USR1", "--batch", number).returncode == 0
    # On a busy machine it comes back several times.
    job = slurm.wait(number, timeout=600.0)
    log = logs(tmp_path)
    assert job["JobState"] == "COMPLETED", log
    assert int(job["Restarts"]) >= 1
    assert "resumed after step" in log
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_under_megatron_a_stage_on_each_node_is_asked_and_resumes_bit_equal(
    slurm: Slurm, corpus: Path, tmp_path: Path
) -> None:
    config, run_dir = config_of(corpus, tmp_path, **under_megatron(pipeline_parallel=2)), tmp_path / "run"
    shorter = [*LONG, "--set", "training.steps=200"]
    number = submit(config, tmp_path, *shorter)
    wait_for_step(run_dir, 20)
    assert slurm.run("scancel", "--signal=USR1", "--batch", number).returncode == 0
    job = slurm.wait(number)
    assert job["JobState"] == "COMPLETED", logs(tmp_path)
    assert int(job["Restarts"]) >= 1
    assert "resumed after step" in logs(tmp_path)
    alone = tmp_path / "alone"
    assert run("train", str(config), *shorter, "--set", f"logging.run_dir={alone}", ranks=2).returncode == 0
    assert_same(run_dir, alone)


@pytest.mark.slow
def test_a_requeued_job_resumes_bit_equal(slurm: Slurm, corpus: Path, tmp_path: Path, whole: Path) -> None:
    config = config_of(corpus, tmp_path)
    number = submit(config, tmp_path, *LONG)
    wait_for_step(tmp_path / "run", 20)
    assert slurm.run("scontrol", "requeue", number).returncode == 0
    job = slurm.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(tmp_path)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_after_a_node_has_died_the_job_goes_on_when_it_is_back(
    slurm: Slurm, corpus: Path, tmp_path: Path, whole: Path
) -> None:
    config = config_of(corpus, tmp_path)
    number = submit(config, tmp_path, *LONG)
    # Past the first checkpoint.
    wait_for_step(tmp_path / "run", 120)
    slurm.kill_node("n2")
    deadline = time.monotonic() + 120
    while slurm.job(number).get("Restarts") != "1":
        assert time.monotonic() < deadline, logs(tmp_path)
        time.sleep(0.2)
    assert len(losses(tmp_path / "run")) < 500
    slurm.start_node("n2")
    job = slurm.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(tmp_path)
    assert "resumed after step 100" in logs(tmp_path)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_an_array_trains_each_rate_in_a_folder_of_its_own(
    slurm: Slurm, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(corpus, tmp_path, slurm={"nodes": 1, "array": "1-2"})
    monkeypatch.setenv("RUNS", str(tmp_path / "sweep"))
    number = submit(config, tmp_path, "--script", "sweep")
    for task in ("1", "2"):
        job = slurm.wait(f"{number}_{task}")
        assert job["JobState"] == "COMPLETED", logs(tmp_path)
    for rate in ("0.002", "0.005"):
        run_dir = tmp_path / f"sweep-lr-{rate}"
        assert len(losses(run_dir)) == 12
        assert json.loads((run_dir / "config.json").read_text())["config"]["optimizer"]["params"]["lr"] == float(rate)
    assert losses(tmp_path / "sweep-lr-0.002") != losses(tmp_path / "sweep-lr-0.005")
