"""A pool of process ranks with Megatron."""

from collections.abc import Iterator

import pytest

from tests.support.megatron_ranks import MegatronPool


@pytest.fixture(scope="session")
def megatron_ranks() -> Iterator[MegatronPool]:
    pool = MegatronPool()
    yield pool
    pool.close()
