"""The examples of one source on disk, memory-mapped: their tokens and which of these are learned.

``tokens.bin`` and ``learned.bin`` hold them one after the other, ``ends.bin`` where each ends, ``hashes.bin`` a hash of
each.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import DataError
from ..files import read_json, write_json
from .encode import Example

_META = "examples.json"


def write_examples(folder: Path, examples: Iterable[Example], *, vocab_size: int, format_name: str) -> int:
    """Write a new folder; returns the number of examples."""
    folder.mkdir()
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    count = position = 0
    with (
        (folder / "tokens.bin").open("wb") as tokens,
        (folder / "learned.bin").open("wb") as learned,
        (folder / "ends.bin").open("wb") as ends,
        (folder / "hashes.bin").open("wb") as hashes,
    ):
        for example in examples:
            if len(example.tokens) and not 0 <= example.tokens.min() <= example.tokens.max() < vocab_size:
                raise DataError(
                    f"data.tokenizer: expected tokens below its length, {vocab_size}, got"
                    f" {example.tokens.min()} to {example.tokens.max()}"
                )
            raw = example.tokens.astype(dtype).tobytes()
            tokens.write(raw)
            learned.write(example.learned.tobytes())
            count, position = count + 1, position + len(example.tokens)
            ends.write(np.int64(position).tobytes())
            hashes.write(np.uint64(xxhash.xxh3_64_intdigest(raw)).tobytes())
    write_json(folder / _META, {"dtype": dtype.name, "format": format_name, "examples": count})
    return count


class ExampleFile:
    """What :func:`write_examples` has written.

    Attributes:
        tokens: unsigned integers, of all examples in order.
        learned: bool, for each token.
        ends: int64, for each example the position in ``tokens`` just after it.
        hashes: uint64, of each example's tokens.
    """

    def __init__(self, folder: Path) -> None:
        meta = read_json(folder / _META)
        self.format_name: str = meta["format"]
        self.tokens = _mapped(folder / "tokens.bin", np.dtype(meta["dtype"]))
        self.learned = _mapped(folder / "learned.bin", np.dtype(np.bool_))
        self.ends: npt.NDArray[np.int64] = _mapped(folder / "ends.bin", np.dtype(np.int64))
        self.hashes: npt.NDArray[np.uint64] = _mapped(folder / "hashes.bin", np.dtype(np.uint64))

    def __len__(self) -> int:
        return len(self.ends)


def _mapped(path: Path, dtype: Any) -> npt.NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r")
