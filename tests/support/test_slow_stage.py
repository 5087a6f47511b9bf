"""Which slow tests run first, and that none starts after the time is up."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command import ROOT, environment
from tests.support.slow_stage import changed_files, concerns, in_order

FILES = [
    "tests/benchmarks/test_quality.py",
    "tests/cluster/test_slurm.py",
    "tests/engine/checkpoint/test_checkpoint.py",
    "tests/engine/run/test_train.py",
    "tests/offload/test_models.py",
    "tests/offload/transfer/test_faults.py",
]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("engine/checkpoint/reading.py", {"tests/engine/checkpoint/test_checkpoint.py"}),
        ("tests/engine/checkpoint/test_checkpoint.py", {"tests/engine/checkpoint/test_checkpoint.py"}),
        ("engine/errors.py", {"tests/engine/checkpoint/test_checkpoint.py", "tests/engine/run/test_train.py"}),
        ("offload/storage/slab.py", {"tests/offload/test_models.py"}),
        ("offload/saving/graph.py", {"tests/offload/test_models.py"}),
        ("launcher/launch/slurm.py", {"tests/cluster/test_slurm.py"}),
        ("benchmarks/quality_run.py", {"tests/benchmarks/test_quality.py"}),
        ("docs/offload.md", set()),
        ("README.md", set()),
        ("constraints.txt", set(FILES)),
        ("tests/support/models.py", set(FILES)),
    ],
)
def test_a_test_is_near_a_change_in_its_folder_or_one_above_or_below(changed: str, expected: set[str]) -> None:
    assert {file for file in FILES if concerns(file, [changed])} == expected


def test_near_ones_come_first_and_the_order_turns_with_the_commit() -> None:
    orders = {tuple(in_order(FILES, ["launcher/main.py"], f"{commit:040x}")) for commit in range(40)}
    assert all(order[0] == "tests/cluster/test_slurm.py" and sorted(order) == FILES for order in orders)
    assert {order[1] for order in orders} == set(FILES) - {"tests/cluster/test_slurm.py"}
    assert in_order(FILES, None, "a") == in_order(FILES, ["pyproject.toml"], "a")


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)  # noqa: S603, S607


def commit(folder: Path, name: str) -> None:
    (folder / name).write_text(name)
    git(folder, "add", ".")
    git(folder, "commit", "-m", name)


def test_changes_since_the_last_merge_and_of_a_merge(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    assert changed_files(repo) is None, "no history"
    git(repo, "init")
    commit(repo, "a")
    assert changed_files(repo) is None, "a first commit: everything is new"
    commit(repo, "b")
    assert changed_files(repo) == ["b"]
    git(repo, "checkout", "-b", "side")
    commit(repo, "c")
    commit(repo, "d")
    git(repo, "checkout", "main")
    git(repo, "merge", "--no-ff", "side")
    assert changed_files(repo) == ["c", "d"]
    commit(repo, "e")
    commit(repo, "f")
    assert changed_files(repo) == ["e", "f"]
    git(tmp_path, "clone", "--depth", "1", f"file://{repo}", "shallow")
    assert changed_files(tmp_path / "shallow") is None


def slow_stage(tests: str, folder: Path, until: float) -> "subprocess.CompletedProcess[str]":
    (folder / "test_it.py").write_text(f"import time, pytest\n{tests}")
    words = [sys.executable, "-m", "pytest", "-p", "tests.support.slow_stage", "--until", str(until), "-ra", "-q", "."]
    path = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(  # noqa: S603
        words, cwd=folder, env=environment(**path), capture_output=True, text=True, timeout=60, check=False
    )


def test_no_test_starts_after_the_time(tmp_path: Path) -> None:
    tests = "def test_a(): time.sleep(1.5)\n@pytest.mark.parametrize('n', [1, 2])\ndef test_b(n): assert False\n"
    result = slow_stage(tests, tmp_path, time.time() - 1)
    assert result.returncode == 0
    assert "SKIPPED [2] test_it.py:3: left out, the time is up" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("3 skipped in ")
    result = slow_stage(tests, tmp_path, time.time() + 60)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith("2 failed, 1 passed in ")


@pytest.mark.parametrize(("name", "code", "last"), [("_GRACE", 0, "1 skipped in "), ("_LONGEST", 1, "1 failed in ")])
def test_a_test_that_does_not_end_is_stopped(tmp_path: Path, name: str, code: int, last: str) -> None:
    """Past the end of the stage it is left out; a hanging one is a failure."""
    (tmp_path / "conftest.py").write_text(
        f"import tests.support.slow_stage as stage\nstage.{name} = 1.0 if {name!r} == '_LONGEST' else -57.0\n"
    )
    result = slow_stage("def test_a(): time.sleep(50)\n", tmp_path, time.time() + 60)
    assert result.returncode == code
    assert result.stdout.splitlines()[-1].startswith(last), result.stdout
