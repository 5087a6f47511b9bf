"""``make gpu``: what can be seen of it without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.compare import Phases, interleave
from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import offload_bits, whole_run
from benchmarks.gpu.methods import COMPARED
from benchmarks.gpu.offload import CASES
from benchmarks.gpu.report import render, table
from benchmarks.gpu.runner import Journal, run_stages
from benchmarks.gpu.stages import ROOT, STAGES, Stage

# What a machine with a GPU may lack.
ABSENT = ("deepspeed", "pydantic", "rich", "typer", "hjson")
GPU = {"device": "GPU A", "driver": "1", "torch": "2"}


def figures_of(names: list[str], folder: Path, absent: tuple[str, ...]) -> list[dict[str, Any]]:
    """What stages print in a process in which nothing of ``absent`` can be imported."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({absent!r})\n")
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "benchmarks.gpu", *names, "--device", "cpu", "--small"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_gpu_tests_of_the_engine_are_left_out_where_it_cannot_be_imported() -> None:
    """Their files failed there while they were collected, and the stage with them."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        if "mark.gpu" in text and re.search(r"^from (narrowgauge\.engine|tests\.engine|megatron)", text, re.MULTILINE):
            before = re.split(r"^from (?:narrowgauge|tests|megatron)", text, maxsplit=1, flags=re.MULTILINE)[0]
            assert 'importorskip("pydantic")' in before, path


@pytest.mark.slow
def test_every_stage_without_deepspeed(tmp_path: Path) -> None:
    found = figures_of([name for name in STAGES if name != "whole_run"], tmp_path, ABSENT)

    def take(count: int, *keys: str) -> list[dict[str, Any]]:
        taken, found[:count] = found[:count], []
        assert all({"case", *keys} == row.keys() for row in taken)
        return taken

    tests = [row for row in found if "outcome" in row]
    assert {row["outcome"] for row in take(len(tests), "outcome", "seconds")} == {"skipped"}
    phases = ("forward", "backward", "both")
    layers = take(30, "shape", "tokens", "dtype", *(f"{p} {unit}" for p in phases for unit in ("ms", "ratio")))
    assert [row["case"] for row in layers[:2]] == ["nn.Linear", "columns, uniform"]
    phases = ("forward", "backward", "optimizer + fold", "step")
    steps = take(5, "refresh ms", *(f"{p} {unit}" for p in phases for unit in ("ms", "ratio")))
    assert [row["step ratio"] == [1.0, 1.0, 1.0] for row in steps] == [True, False, False, False, False]
    assert all((row["refresh ms"] is None) == (row["case"] == "AdamW") for row in steps)
    own = ("step ms", "step ratio", "optimizer ms", "optimizer ratio")
    names = [row["case"] for row in take(2, *own) + take(6, *own, "step with change of subspace ms")]
    assert names == list(COMPARED)
    peaks = ("peak MiB", "reserved MiB")
    rows = take(8, *peaks, "between steps MiB", "peak ratio", "before MiB")
    assert [row["case"] for row in rows] == list(COMPARED)
    phases = ("forward", "backward", "step")
    moved = ("waited ms", "written MiB", "read MiB", "not written", "write GB/s", "read GB/s", "I/O", "peak MiB")
    rows = take(len(CASES), *moved, *(f"{p} {unit}" for p in phases for unit in ("ms", "ratio")))
    by_case = {row["case"]: row for row in rows}
    assert by_case["offload everything"]["written MiB"] > by_case["layer inputs"]["written MiB"] > 0
    assert by_case["offload everything"]["I/O"] == "threads"
    assert by_case["pinned memory"]["written MiB"] == by_case["pinned memory"]["not written"] == 0
    rows = take(len(CASES), "same bits", "steps", "gradients")
    assert all(row["same bits"] and row["gradients"] == 21 for row in rows)
    assert all(row["fits"] for row in take(2, "fits", *peaks))
    assert [row["case"] for row in take(2, *own, "tokens/s")] == ["AdamW, fused", "Grass 1/8, fused"]
    assert found == []


@pytest.mark.slow
def test_a_whole_run_without_deepspeed(tmp_path: Path) -> None:
    dense, compact, offloaded = figures_of(["whole_run"], tmp_path, ("deepspeed",))
    assert [row.pop("case") for row in (dense, compact, offloaded)] == list(whole_run.cases(""))
    assert compact["optimizer state MiB"] < dense["optimizer state MiB"] / 4
    assert [offloaded[key] for key in ("steps", "loss", "validation loss")] == [
        compact[key] for key in ("steps", "loss", "validation loss")
    ]


def test_other_bits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(3)
    cases = {
        name: SimpleNamespace(name=name, gradients=lambda other=other: [other], close=lambda: None)
        for name, other in (("keep all", values), ("off", values.nextafter(values + 1)))
    }
    monkeypatch.setattr(offload_bits, "make_cases", lambda *_: cases)
    rows: list[dict[str, Any]] = []
    offload_bits.run(lambda **row: rows.append(row), small=True)
    assert [(row["case"], row["same bits"]) for row in rows] == [("keep all", True), ("off", False)]
    assert not torch.are_deterministic_algorithms_enabled()


class Fake(Stage):
    """A stage whose code is ``text``: a shell script, run instead of Python."""

    def code(self) -> str:
        return self.text


def fake(name: str, script: str, limit: float = 60.0, needs: tuple[str, ...] = ()) -> Stage:
    return Fake(name=name, title=name, text=script, needs=needs, sources=(), limit=limit)


def run(folder: Path, *stages: Stage, machine: dict[str, str] = GPU, **options: Any) -> dict[str, Any]:
    """Run stages; the records of all that there are."""
    journal = Journal(folder=folder)
    run_stages(
        stages,
        journal=journal,
        machine=machine,
        commit="c",
        command=lambda stage: ["/bin/sh", "-c", f"{stage.text}; echo {stage.name} >>{folder}/ran"],
        **options,
    )
    return journal.read()["stages"]


def ran(folder: Path) -> list[str]:
    """The names of the stages that ran to their end since the last call."""
    path = folder / "ran"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def test_what_is_done_is_not_repeated(tmp_path: Path) -> None:
    script = """echo '{"case": "a", "x ms": 1.5}'; echo '{"case": "b", "x ms": 2.5}'"""
    records = run(tmp_path, fake("one", script))
    assert records["one"]["figures"] == [{"case": "a", "x ms": 1.5}, {"case": "b", "x ms": 2.5}]
    assert (records["one"]["state"], records["one"]["machine"], records["one"]["commit"]) == ("done", GPU, "c")
    assert ran(tmp_path) == ["one"]
    run(tmp_path, fake("one", script))
    run(tmp_path, fake("one", script), machine={**GPU, "driver": "2"})
    assert ran(tmp_path) == []
    again: list[dict[str, Any]] = [
        {"machine": {**GPU, "device": "GPU B"}},
        {"machine": {**GPU, "torch": "3"}},
        {"again": True},
    ]
    for changes in again:
        run(tmp_path, fake("one", script), **changes)
        assert ran(tmp_path) == ["one"]
    assert run(tmp_path, fake("one", "echo '{}'"))["one"]["figures"] == [{}]


def test_what_failed_or_was_late_is_noted_and_the_next_begins(tmp_path: Path) -> None:
    failing = fake("failing", 'echo \'{"case": "a"}\'; echo first >&2; echo it broke >&2; exit 3')
    late = fake("late", 'echo \'{"case": "a"}\'; printf \'{"case": \'; sleep 60 & wait', limit=0.5)
    records = run(tmp_path, failing, late, fake("good", "true"))
    states = {name: (own["state"], own["reason"], len(own["figures"])) for name, own in records.items()}
    assert states == {
        "failing": ("failed", "it broke", 1),
        "late": ("out of time", "limit 0.5 s", 1),
        "good": ("done", "", 0),
    }
    assert ran(tmp_path) == ["good"]
    # What was never tried goes before what is tried again.
    run(tmp_path, failing, fake("good", "true"), fake("new", "true"))
    assert ran(tmp_path) == ["new"]


def test_the_budget_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = fake("long", "true", limit=100), fake("short", "true", limit=5)
    records = run(tmp_path, *stages, fake("lacking", "true", needs=("no_such_package",)), budget=50)
    assert list(records) == ["short"]
    said = capsys.readouterr().out
    assert "lacking: left out, not installed: no_such_package" in said
    assert "long: not begun, it may take 100 s of the 50 s left" in said


def test_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "benchmarks.gpu", "--folder", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "PyTorch finds no CUDA device here" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--small", "--folder", str(ROOT / "docs")], "docs/ is for figures of a GPU"),
        (["--small", "--folder", str(ROOT / "docs")], "docs/ is for figures of a GPU"),
        (["--device", "cpu"], "expected --small with it"),
        (["nothing"], "got nothing"),
    ],
)
def test_refusals(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_page_is_made_from_the_figures() -> None:
    record = json.loads((ROOT / "docs" / "gpu.json").read_text())
    assert (ROOT / "docs" / "gpu.md").read_text() == render(record)
    empty = render({"stages": {}})
    assert empty.count("\nNot run.\n") == empty.count("\n## ") == len(STAGES)


def test_table() -> None:
    rows = [{"case": "a|b", "ms": 1234.5, "ratio": [0.5, 0.25, 1.0]}, {"case": "c", "same": False, "MiB": None}]
    assert table(rows) == [
        "|  | ms | ratio | same | MiB |",
        "|---|---:|---:|---:|---:|",
        "| a\\|b | 1,234 | 0.500x (0.250-1.000) |  |  |",
        "| c |  |  | **no** |  |",
    ]


def test_stages_fit_and_know_their_code() -> None:
    assert all(stage.limit <= 480 for stage in STAGES.values())
    assert all((ROOT / source).exists() for stage in STAGES.values() for source in stage.sources)
    assert len({stage.code() for stage in STAGES.values()}) == len(STAGES)


def test_rounds_end_with_the_time() -> None:
    def step(phases: Phases) -> None:
        with phases.phase("step"):
            pass

    phases = interleave({"a": step, "b": step}, rounds=9, warmup=1, seconds=0.0)
    assert [len(own.seconds["step"]) for own in phases.values()] == [3, 3]
    assert len(interleave({"a": step}, rounds=9)["a"].seconds["step"]) == 9
