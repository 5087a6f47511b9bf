"""Backends by name: registered once, asked whether they work, chosen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.errors import ConfigError
from narrowgauge.engine.offload.attach import check_offload
from narrowgauge.offload import OffloadError
from narrowgauge.offload.backends import BACKENDS, Backend, available_backends, backend_names, register
from narrowgauge.offload.backends.threads import ThreadsLane
from tests.offload.support import compare, new_offload


class CountingLane(ThreadsLane):
    def __init__(self, backend: "Counting") -> None:
        self._backend = backend

    def write(self, fd: int, offset: int, buffer: Tensor) -> None:
        type(self._backend).writes += 1
        super().write(fd, offset, buffer)


class Counting(Backend):
    name = "counting"
    title = "threads that count"
    writes = 0

    def lane(self) -> CountingLane:
        return CountingLane(self)


class Missing(Counting):
    name = "missing"
    needs_build = True

    @classmethod
    def unavailable_because(cls) -> str | None:
        return "not compiled"

    @classmethod
    def unbuildable_because(cls) -> str | None:
        return "no compiler"

    def __init__(self) -> None:
        raise OSError("it is missing")


@pytest.fixture(autouse=True)
def only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, backend in [*BACKENDS.items()]:
        monkeypatch.setitem(BACKENDS, name, backend)
    for backend in (Counting, Missing):
        monkeypatch.setitem(BACKENDS, backend.name, backend)


def block_of(folder: Path, backend: str) -> dict[str, Any]:
    block = {"path": str(folder), "backend": backend, "capacity_bytes": 1 << 20}
    return {"train_batch_size": 1, "activation_offload": block}


def test_registered_backend_is_used_by_its_name(tmp_path: Path) -> None:
    offload = new_offload(tmp_path, backend="counting")
    before = Counting.writes
    traffic = compare(offload, lambda x: (x * 2).exp().sum(), torch.linspace(-1, 1, 1000).requires_grad_())
    traffic.assert_written_and_read(4000, storages=1)
    assert Counting.writes == before + 1
    assert offload.stats().backend == "counting"
    offload.close()


def test_configuration_knows_registered_names(tmp_path: Path) -> None:
    config = load_config(block_of(tmp_path, "counting"))
    check_offload(config)
    options = config.offload()
    assert options is not None
    assert options.backend == "counting"
    with pytest.raises(ConfigError, match=r"activation_offload\.backend: expected one of 'auto', .*, got 'fast'"):
        load_config(block_of(tmp_path, "fast"))


def test_what_cannot_be_built_is_said_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"activation_offload\.backend: missing: no compiler"):
        check_offload(load_config(block_of(tmp_path, "missing")))
    with pytest.raises(OffloadError, match=r"backend: missing cannot be used on .*: it is missing"):
        new_offload(tmp_path, backend="missing")


def test_available_and_missing() -> None:
    found, missing = available_backends()
    names = [backend.name for backend in found]
    assert names[0] == "threads"
    assert "counting" in names
    assert missing["missing"] == "not compiled"
    assert sorted([*names, *missing]) == backend_names()[1:]


def test_names_are_taken_once() -> None:
    class Other(Counting):
        name = "threads"

    with pytest.raises(ValueError, match="backend: expected a new name, got 'threads'"):
        register(Other)
    assert BACKENDS["threads"] is not Other
    assert register(Counting) is Counting
