"""What all tests of offload share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _imports_are_left_out_of_collections() -> Iterator[None]:
    """Many tests collect garbage; going through all that torch has made takes longer than the rest of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
