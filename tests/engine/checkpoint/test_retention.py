"""Which checkpoints of a run go when another is saved."""

import json
from pathlib import Path

import pytest

import narrowgauge.engine.checkpoint.retention as retention_module
from narrowgauge.engine.checkpoint.files import checksum, write_manifest
from narrowgauge.engine.checkpoint.retention import Retention


def make(folder: Path, step: int) -> Path:
    """A checkpoint of one process rank, by its files."""
    path = folder / f"step-{step}"
    path.mkdir()
    (path / "state.json").write_text(json.dumps({"world_size": 1, "zero_stage": 0}))
    for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors"):
        (path / name).write_bytes(bytes(range(step % 200 + 1)))
    write_manifest(path, {file.name: checksum(file) for file in path.iterdir()})
    return path


def damage(path: Path) -> None:
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_damaged_checkpoints_do_not_count(tmp_path: Path) -> None:
    """Of [5, damaged 10, damaged 15] with two to keep, saving 6 deleted 5 and 6: all that could be continued from."""
    for step in (5, 10, 15):
        make(tmp_path, step)
    damage(tmp_path / "step-10")
    damage(tmp_path / "step-15")
    retention = Retention(tmp_path, 2)
    make(tmp_path, 6)
    retention.saved(6)
    assert steps(tmp_path) == [5, 6, 10, 15]
    make(tmp_path, 7)
    retention.saved(7)
    assert steps(tmp_path) == [6, 7, 10, 15]


def test_the_last_good_one_stays_whatever_was_damaged_since(tmp_path: Path) -> None:
    retention = Retention(tmp_path, 2)
    for step in (1, 2, 3):
        make(tmp_path, step)
        retention.saved(step)
    assert steps(tmp_path) == [2, 3]
    damage(tmp_path / "step-3")
    make(tmp_path, 4)
    retention.saved(4)
    assert steps(tmp_path) == [2, 3, 4]
    make(tmp_path, 5)
    retention.saved(5)
    assert steps(tmp_path) == [4, 5]


def test_what_a_damaged_one_has_replaced_counts_in_its_place(tmp_path: Path) -> None:
    """The run went on from ``step-10.old``; the damaged folder beside it was counted as good, by its step."""
    for step in (5, 10, 15):
        make(tmp_path, step)
    (tmp_path / "step-10").rename(tmp_path / "step-10.old")
    damage(make(tmp_path, 10))
    damage(tmp_path / "step-15")
    retention = Retention(tmp_path, 2)
    retention.vouch(tmp_path / "step-10.old")
    make(tmp_path, 12)
    retention.saved(12)
    assert {path.name for path in tmp_path.iterdir()} == {"step-10", "step-10.old", "step-12", "step-15"}
    damage(tmp_path / "step-10.old")
    make(tmp_path, 13)
    retention.saved(13)
    make(tmp_path, 14)
    retention.saved(14)
    assert steps(tmp_path) == [13, 14, 15]


def test_what_was_read_once_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all kept checkpoints at every save would take longer than writing one."""
    read: list[str] = []
    original = retention_module.verify_files
    monkeypatch.setattr(retention_module, "verify_files", lambda path: (read.append(path.name), original(path)))
    make(tmp_path, 1)
    retention = Retention(tmp_path, 3)
    for step in (2, 3, 4):
        make(tmp_path, step)
        retention.saved(step)
    assert read == ["step-1"]
    assert steps(tmp_path) == [2, 3, 4]
