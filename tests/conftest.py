"""Fixtures: process ranks shared by the session, and a cache of tokenizers and tokens."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import RankPool

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
