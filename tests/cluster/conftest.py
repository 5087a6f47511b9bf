"""Hosts and a SLURM, each made once for all tests here."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.network import Network
from tests.cluster.slurm import Slurm
from tests.support.command import BIN

MEGABITS = 100


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Two hosts."""
    with Network(tmp_path_factory.mktemp("network"), 2) as made:
        yield made


@pytest.fixture(scope="session")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the second of the odd hosts does not see."""
    return tmp_path_factory.mktemp("unseen")


@pytest.fixture(scope="session")
def odd_network(tmp_path_factory: pytest.TempPathFactory, unseen: Path) -> Iterator[Network]:
    """Hosts on slow links; the second has another version of DeepSpeed, the third no environment of Python."""
    metadata = tmp_path_factory.mktemp("other") / "deepspeed-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n")
    path = os.pathsep.join(filter(None, (str(metadata.parents[1]), os.environ.get("PYTHONPATH"))))
    with Network(
        tmp_path_factory.mktemp("odd"),
        3,
        rate=f"{MEGABITS}mbit",
        hide={"h2": unseen, "h3": Path(sys.prefix).resolve()},
        environment={"h2": {"PYTHONPATH": path}},
    ) as made:
        yield made


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes; submitting tests find this environment's commands."""
    with pytest.MonkeyPatch.context() as patch, Slurm(tmp_path_factory.mktemp("slurm"), 2) as made:
        patch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield made
