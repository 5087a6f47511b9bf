"""Token files in Megatron's indexed format: ``NAME.bin`` holds the tokens, ``NAME.idx`` how they are cut into
documents.

Layout of ``.idx``, little-endian: magic, version (u64), dtype code (u8), number of sequences (u64), number of
document bounds (u64), then the sequences' lengths (i32), their byte offsets (i64) and the document bounds as sequence
numbers (i64).
"""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ..errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class TokenFile:
    """One ``.bin``/``.idx`` pair, memory-mapped.

    Attributes:
        tokens: all tokens of the file in order.
        document_ends: for each document, the position in ``tokens`` just after it.
    """

    def __init__(self, prefix: Path) -> None:
        """Open ``prefix.bin`` and ``prefix.idx``.

        Raises:
            DataError: one is missing, the index is damaged, or the two disagree.
        """
        self.bin_path, self.index_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (self.bin_path, self.index_path):
            if not path.is_file():
                raise DataError(f"{path}: no such file; a Megatron dataset is a .bin and an .idx beside each other")
        dtype, lengths, offsets, bounds = self._read_index()
        num_tokens = int(lengths.sum(dtype=np.int64))
        found, described = self.bin_path.stat().st_size, num_tokens * np.dtype(dtype).itemsize
        if found != described:
            raise DataError(
                f"{self.bin_path} has {found} bytes, {self.index_path} describes {described}: they do not match"
            )
        if num_tokens == 0:
            raise DataError(f"{self.bin_path}: empty, it holds no tokens")
        ends = np.cumsum(lengths, dtype=np.int64)
        if not np.array_equal(offsets, (ends - lengths) * np.dtype(dtype).itemsize):
            raise DataError(f"{self.index_path}: the sequences are not stored one after the other")
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(lengths) or np.any(np.diff(bounds) < 0):
            raise DataError(
                f"{self.index_path}: damaged, its document bounds do not cover its {len(lengths)} sequences"
            )
        self.tokens: npt.NDArray[np.integer] = np.memmap(self.bin_path, dtype=dtype, mode="r")
        self.document_ends: npt.NDArray[np.int64] = np.concatenate(([0], ends))[bounds[1:]]

    def _read_index(self) -> tuple[type, npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        data = self.index_path.read_bytes()
        if len(data) < _HEADER.size or not data.startswith(_MAGIC):
            raise DataError(f"{self.index_path}: not a Megatron index (its first bytes are {data[:9]!r})")
        _, version, code, num_sequences, num_bounds = _HEADER.unpack_from(data)
        if version != 1 or code not in _DTYPES:
            raise DataError(
                f"{self.index_path}: expected version 1 with a dtype code of {list(_DTYPES)}, got {version} with {code}"
            )
        needed = _HEADER.size + 12 * num_sequences + 8 * num_bounds
        if len(data) < needed:
            raise DataError(f"{self.index_path}: cut short: its header says {needed} bytes, got {len(data)}")
        lengths = np.frombuffer(data, np.int32, num_sequences, _HEADER.size)
        offsets = np.frombuffer(data, np.int64, num_sequences, _HEADER.size + 4 * num_sequences)
        bounds = np.frombuffer(data, np.int64, num_bounds, _HEADER.size + 12 * num_sequences)
        return _DTYPES[code], lengths, offsets, bounds


def write_tokens(prefix: Path, documents: Iterable[list[int]], vocab_size: int) -> int:
    """Write documents as ``prefix.bin`` and ``prefix.idx``; returns the number of tokens."""
    code = 8 if vocab_size <= 1 << 16 else 4
    dtype = _DTYPES[code]
    lengths = []
    with Path(f"{prefix}.bin").open("wb") as file:
        for document in documents:
            file.write(np.asarray(document, dtype=dtype).tobytes())
            lengths.append(len(document))
    with Path(f"{prefix}.idx").open("wb") as file:
        _write_index(file, code, np.asarray(lengths, dtype=np.int32))
    return sum(lengths)


def _write_index(file: IO[bytes], code: int, lengths: npt.NDArray[np.int32]) -> None:
    ends = np.cumsum(lengths, dtype=np.int64)
    file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
    file.write(lengths.tobytes())
    file.write(((ends - lengths) * np.dtype(_DTYPES[code]).itemsize).tobytes())
    file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
