"""Fixtures: process ranks shared by the session, and a small corpus; marks tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from narrowgauge.offload.backends.deepspeed_build import prefer_own_ninja
from tests.support.cases import mark_others_slow, mark_the_rest_slow
from tests.support.ranks import RankPool

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small, and some run side by side
prefer_own_ninja()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest_slow(items)
    mark_others_slow(items)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text: some source files of the standard library, enough to train a tokenizer on."""
    import sysconfig

    folder = tmp_path_factory.mktemp("corpus")
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "calendar", "configparser", "csv", "datetime", "difflib", "heapq", "inspect"):
        (folder / f"{name}.txt").write_text((root / f"{name}.py").read_text(encoding="utf-8"))
    return folder
