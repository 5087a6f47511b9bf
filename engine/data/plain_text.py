"""Whether a file is plain text. Records, compressed and binary files would be trained on as the characters they are
written with.
"""

import csv
import re
from pathlib import Path

from ..errors import DataError

_START_BYTES = 1 << 16
_BY_NAME = {
    "JSON": ("json", "json5", "jsonl", "jsonlines", "jl", "ndjson", "geojson", "ipynb"),
    "comma- or tab-separated values": ("csv", "tsv"),
    "Parquet": ("parquet",),
    "Arrow": ("arrow", "feather", "ipc"),
    "records": (
        "avro",
        "bson",
        "warc",
        "wet",
        "orc",
        "tfrecord",
        "tfrecords",
        "msgpack",
        "mds",
        "sqlite",
        "db",
        "h5",
        "hdf5",
        "xlsx",
        "xls",
    ),
    "compressed": ("gz", "tgz", "zst", "bz2", "xz", "lzma", "lz4", "br", "zip", "7z", "rar", "tar"),
    "arrays or weights": ("npy", "npz", "pt", "pth", "ckpt", "safetensors", "gguf", "pkl", "pickle"),
    "a document with a layout": ("pdf", "docx", "doc", "odt", "epub", "rtf"),
}
_SUFFIXES = {f".{suffix}": kind for kind, suffixes in _BY_NAME.items() for suffix in suffixes}
_BY_START = {
    b"\x1f\x8b": "compressed (gzip)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"BZh": "compressed (bzip2)",
    b"\xfd7zXZ\0": "compressed (xz)",
    b"\x04\x22\x4d\x18": "compressed (lz4)",
    b"PK\x03\x04": "compressed (zip)",
    b"7z\xbc\xaf\x27\x1c": "compressed (7z)",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xff\xff\xff": "Arrow",
    b"Obj\x01": "records (Avro)",
    b"\x89HDF\r\n\x1a\n": "records (HDF5)",
    b"SQLite format 3\0": "records (SQLite)",
    b"\x93NUMPY": "arrays (NumPy)",
    b"%PDF-": "a document with a layout (PDF)",
}
_STRING = r'"(?:[^"\\\n]|\\.)*"'
# An object with a key; a list of objects, of lists or of several strings.
_JSON_START = re.compile(rf"\ufeff?\s*(?:\{{\s*{_STRING}\s*:|\[\s*(?:\{{\s*{_STRING}\s*:|\[\s*[\[\"\d]|{_STRING}\s*,))")

# What a page or a document of another name than that of source code begins with.
_MARKUP_START = re.compile(r"\ufeff?\s*<(?:!doctype\s+html|html[\s>]|\?xml\s)", re.IGNORECASE)
# The first row of a table of another name than .csv or .tsv, and as many rows as tell one from prose or source code.
_HEADER = re.compile(r"\ufeff?(\"?\w[\w.-]*\"?)(?:([,;\t|])(\"?\w[\w.-]*\"?))+")
_ROWS = 5
_MARKUP = (".htm", ".html", ".svg", ".xhtml", ".xml", ".xsd", ".xsl", ".xslt", ".vue", ".php", ".jsp")


def check_plain_text(path: Path, key: str) -> None:
    """Refuse a file that is not plain text, by its name and by how it begins.

    Args:
        key: the configuration key, for messages.

    Raises:
        DataError: naming the file and what it is.
    """
    kind = _SUFFIXES.get(path.suffix.lower()) or _kind_of(path)
    if kind is not None:
        raise DataError(
            f"{key}: {path}: expected plain text or Megatron's .bin and .idx, or records by the names .jsonl, .json"
            f" and .parquet (also with .gz or .zst), got {kind}, which would be trained on as it is written; extract"
            " its text into a file first"
        )


def _kind_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for magic, kind in _BY_START.items():
        if start.startswith(magic):
            return kind
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16"
    if b"\0" in start:
        return "bytes that are no text"
    text = start.decode(errors="ignore")
    if path.suffix.lower() not in _MARKUP and _MARKUP_START.match(text):
        return f"HTML or XML (which is taken as source code by the names {', '.join(_MARKUP)})"
    if _JSON_START.match(text):
        return "JSON"
    if _is_table(text, is_cut=len(start) == _START_BYTES):
        return "comma- or tab-separated values, by its first rows"
    return None


def _is_table(start: str, *, is_cut: bool) -> bool:
    """Whether names without spaces stand in the first line, and rows of as many fields below it to the end."""
    lines = start.splitlines(keepends=True)
    match = _HEADER.fullmatch(lines[0].rstrip("\r\n")) if lines else None
    if match is None:
        return False
    rows: list[list[str]] = []
    try:
        for row in filter(None, csv.reader(lines, delimiter=match[2], strict=True)):
            rows.append(row)
    except csv.Error:
        # Of the last row, perhaps.
        if not is_cut:
            return False
    else:
        if is_cut:
            rows.pop()
    return len(rows) >= _ROWS and len({*rows[0]}) == len(rows[0]) and all(len(row) == len(rows[0]) for row in rows)
