"""The memory of a process without a GPU: what its allocator has given out."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch
from torch.nn.functional import scaled_dot_product_attention

# Seconds between looks; each takes some ten microseconds.
_INTERVAL = 0.001
# Of a product that uses its buffers as large products do; some ten milliseconds.
_BLAS_SIZE = 1024
# Of attention, one in a block of queries and several.
_ATTENTION_LENGTHS = (64, 256)


class _Info(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33."""

    _fields_ = [(f"value_{number}", ctypes.c_size_t) for number in range(10)]

    @property
    def given_out(self) -> int:
        """``uordblks`` and ``hblkhd``: in arenas, and mapped one by one."""
        return int(self.value_7) + int(self.value_4)


@cache
def _ask() -> Callable[[], _Info] | None:
    with suppress(AttributeError, OSError):
        ask = ctypes.CDLL(None).mallinfo2
        ask.restype = _Info
        return ask
    return None


def heap_bytes() -> int | None:
    """Bytes that the C library's allocator has given out and not got back; None where it does not say."""
    ask = _ask()
    return ask().given_out if ask is not None else None


class HeapMeter:
    """The most that was given out while it watched, beyond what there was when it was made, and beyond what the BLAS
    keeps from its first product and its first attention in bf16 on to pack matrices: some MB each, which depend on the
    processor.
    """

    def __init__(self) -> None:
        square = torch.zeros(_BLAS_SIZE, _BLAS_SIZE)
        square.mm(square)
        for length in _ATTENTION_LENGTHS:
            heads = torch.zeros(1, 1, length, 64, dtype=torch.bfloat16)
            scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            del heads
        del square
        self._before, self._peak = heap_bytes(), 0

    @property
    def peak(self) -> int | None:
        """None where the allocator does not say, or nothing was watched."""
        return self._peak or None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look every millisecond."""
        if self._before is None:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._look, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _look(self, done: threading.Event) -> None:
        assert self._before is not None
        while not done.wait(_INTERVAL):
            found = heap_bytes()
            if found is not None:
                self._peak = max(self._peak, found - self._before)
