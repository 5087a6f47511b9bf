"""A rank that raises: all ranks of a real torchrun end, soon and with a reason each, whatever they wait for."""

import json
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from narrowgauge.engine.data.tokens import write_tokens
from tests.support import forked
from tests.support.command import ROOT, arguments, environment, records, tiny_config, wait_for_step

SECONDS = 15


def start_ranks(*words: str) -> "subprocess.Popen[str]":
    """On two ranks of torchrun; what they say on stderr comes through a pipe, which no limit of files concerns."""
    return subprocess.Popen(  # noqa: S603
        arguments(*words, ranks=2),
        env=environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="600"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process: "subprocess.Popen[str]") -> tuple[float, list[str]]:
    """Seconds from the first error to the end of all processes, and the errors that the ranks said."""
    assert process.stderr is not None
    family = psutil.Process(process.pid).children(recursive=True)
    said, first = [], None
    for line in process.stderr:
        if line.startswith("error: "):
            first = first or time.monotonic()
            said.append(line.rstrip())
    assert process.wait(60) != 0
    _, alive = psutil.wait_procs(family, timeout=SECONDS)
    assert not alive
    assert first is not None
    return time.monotonic() - first, said


def tokens(path: Path, count: int, *, bad: int | None = None) -> None:
    dice = random.Random(0)
    documents = [[dice.randrange(500) for _ in range(32)] for _ in range(count)]
    if bad is not None:
        documents[bad][3] = 501
    write_tokens(path, documents, vocab_size=600)


# Seconds are measured.
@pytest.mark.alone
def test_a_bad_token_in_one_ranks_share_ends_all(corpus: Path, tmp_path: Path) -> None:
    """The rank that met it waited at its exit for a worker of its loader, which ignores SIGTERM: torchrun never
    noticed, and the other rank sat in its collective until the watchdog came.
    """
    tokens(tmp_path / "train", 200, bad=100)
    tokens(tmp_path / "held", 8)
    config = json.loads(tiny_config(corpus, tmp_path).read_text())
    config["data"] = {
        "train": [str(tmp_path / "train")],
        "validation": [str(tmp_path / "held")],
        "sequence_length": 32,
        "cache_dir": str(tmp_path / "cache"),
        "num_workers": 2,
    }
    config["model"]["config"]["vocab_size"] = 500
    config["training"] |= {"steps": 25}
    (tmp_path / "config.json").write_text(json.dumps(config))
    seconds, said = end_of(start_ranks("train", str(tmp_path / "config.json")))
    assert seconds < SECONDS
    reason = f"{tmp_path / 'train.bin'}: expected tokens below the model's vocab_size, 500, got 501"
    assert f"error: {reason}" in said
    others = [line for line in said if line != f"error: {reason}"]
    assert len(others) <= 1
    assert all(line.startswith("error: process rank ") and reason in line for line in others)


# Seconds are measured.
@pytest.mark.alone
def test_a_file_limit_on_one_rank_ends_all_and_names_the_file(corpus: Path, tmp_path: Path) -> None:
    """As a full disk. The message named no file, and the other rank stayed."""
    config, run_dir = str(tiny_config(corpus, tmp_path)), tmp_path / "run"
    # Without checkpoints, whose files the limit would meet every fourth step.
    more = ["--set", "training.steps=100000", "--set", "training.checkpoint_interval=50000"]
    process = start_ranks("train", config, *more)
    wait_for_step(run_dir, 3, process)
    ranks = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "0"]
    resource.prlimit(ranks[0].pid, resource.RLIMIT_FSIZE, (1, 1))
    seconds, said = end_of(process)
    assert seconds < SECONDS
    reason = f"[Errno 27] File too large: '{run_dir / 'metrics.jsonl'}'"
    assert any(line.startswith("error: process rank 0 on ") and line.endswith(reason) for line in said)
    assert len(said) <= 2
    assert all(reason in line for line in said)


def deleted(run_dir: Path) -> None:
    shutil.rmtree(run_dir)


def deleted_slowly(run_dir: Path) -> None:
    """TensorBoard's file is opened by name, and fails before the lock is gone."""
    shutil.rmtree(run_dir / "tensorboard")
    time.sleep(1)
    shutil.rmtree(run_dir)


def a_file_instead(run_dir: Path) -> None:
    run_dir.rename(run_dir.with_name("moved"))
    run_dir.write_text("")


def a_loop_instead(run_dir: Path) -> None:
    run_dir.rename(run_dir.with_name("moved"))
    run_dir.symlink_to(run_dir.name)


@pytest.mark.quick("deleted_slowly", "a_file_instead")
@pytest.mark.parametrize("change", [deleted, deleted_slowly, a_file_instead, a_loop_instead])
def test_a_run_folder_that_is_deleted_or_replaced_is_noticed(
    corpus: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """The run went on, into files without a name, and its next checkpoint made the folder again, without the rest."""
    config, run_dir = str(tiny_config(corpus, tmp_path)), tmp_path / "run"
    more = ["--set", "training.steps=100000", "--set", "training.checkpoint_interval=50000"]
    process = forked.start("train", config, *more)
    wait_for_step(run_dir, 3, process)
    reached = len(records(run_dir))
    change(run_dir)
    assert process.wait(60) == 2
    assert reached
    assert not run_dir.is_dir()
    (line,) = process.said()[1].splitlines()
    assert line == (f"error: logging.run_dir: {run_dir} was deleted or replaced while the run was going on")


INTERRUPTED = """
import os, sys
from narrowgauge.engine.report.metrics import MetricsLog
from narrowgauge.launcher.main import main
def interrupt(*args):
    raise KeyboardInterrupt
if os.environ["RANK"] == "0":
    MetricsLog.write = interrupt
main()
"""


def test_who_keeps_the_store_is_named_after_it_is_gone(corpus: Path, tmp_path: Path) -> None:
    """Without torchrun process rank 0 keeps it: the other told of a closed connection, and nobody of the reason."""
    found = forked.python("-c", INTERRUPTED, "train", str(tiny_config(corpus, tmp_path)), ranks=2)
    assert found.returncode == 1
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: process rank 1 on ")
    assert line.partition(": ended, as process rank 0 on ")[2].endswith(": KeyboardInterrupt: KeyboardInterrupt")
