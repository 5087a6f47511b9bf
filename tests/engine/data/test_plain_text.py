"""Files that are no plain text are refused before anything is built from them."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from narrowgauge.engine.config.run_blocks import DataBlock
from narrowgauge.engine.data.plain_text import check_plain_text
from narrowgauge.engine.data.prepare import prepare_data
from narrowgauge.engine.errors import DataError

RECORD = json.dumps({"text": "Once upon a time", "id": 3})
STRUCTURED = {
    "a.jsonl": (b"x", "JSON"),
    "a.json": (b"x", "JSON"),
    "a.parquet": (b"x", "Parquet"),
    "a.CSV": (b"text,label\n", "comma-"),
    "a.arrow": (b"x", "Arrow"),
    "a.txt.gz": (b"x", "compressed"),
    "a.safetensors": (b"x", "weights"),
    "lines.txt": (f"{RECORD}\n{RECORD}\n".encode(), "JSON"),
    "pretty.txt": (json.dumps({"a": [1, 2]}, indent=2).encode(), "JSON"),
    "list.txt": (json.dumps([{"a": 1}]).encode(), "JSON"),
    "nested.txt": (b"[[1, 2], [3]]", "JSON"),
    "page.txt": (b"\n<!DOCTYPE html>\n<html><body>Text</body></html>", "HTML"),
    "feed": (b'<?xml version="1.0"?><a>Text</a>', "XML"),
    "reviews.txt": (b"text,label\n" + b'"Not ""bad"",\nor is it", 1\n' * 5000, "comma-"),
    "table.dat": (b"id\tname\tyear\n" + b"1\tA, B\t1999\n" * 4, "comma-"),
    "zipped": (gzip.compress(b"text"), "gzip"),
    "bz": (bz2.compress(b"text"), "bzip2"),
    "xz": (lzma.compress(b"text"), "xz"),
    "table": (b"PAR1\x15\x04", "Parquet"),
    "stream": (b"\xff\xff\xff\xff\x10\0\0\0", "Arrow"),
    "utf16.txt": ("text".encode("utf-16"), "UTF-16"),
    "numbers": (bytes(range(256)), "bytes that are no text"),
}
PLAIN = {
    "code.py": '"""Text."""\n',
    "list.py": "[1, 2, 3]\n",
    "braces.c": "{ int x; }\n",
    "markdown.md": "[a link](x)\n",
    "csv.txt": "a,b\n",
    "prose.txt": "Hello,world\nOne, two\nThree\n" * 9,
    "heading.txt": "Sons, Lovers\n" + "a, b\n" * 9,
    "poem": '"Tyger, tyger"\n',
    "page.html": "<!DOCTYPE html>\n",
    "tags.txt": "<html_parser> is a module\n",
    "notes.txt": "[1] A. Author\n",
    "empty": "",
}


@pytest.mark.parametrize("name", list(STRUCTURED))
def test_structured_text_is_refused(tmp_path: Path, name: str) -> None:
    """It was trained on raw, with its braces, keys and compressed bytes."""
    content, kind = STRUCTURED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^data\.train: {re.escape(str(path))}: expected plain text .*, got .*{kind}"):
        check_plain_text(path, "data.train")


@pytest.mark.parametrize("name", list(PLAIN))
def test_plain_text_is_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(PLAIN[name])
    check_plain_text(path, "data.train")


@pytest.mark.parametrize("key", ["train", "validation"])
def test_all_files_are_looked_at(corpus: Path, tmp_path: Path, key: str) -> None:
    (tmp_path / "b.txt").write_text(RECORD)
    lists = {"train": [str(corpus / "csv.txt")], "validation": [str(corpus / "ast.txt")]}
    lists[key].append(str(tmp_path / "b.txt"))
    block = DataBlock.model_validate({**lists, "cache_dir": str(tmp_path / "cache")})
    with pytest.raises(DataError, match=rf"^data\.{key}: .*b\.txt: expected plain text .*, got JSON"):
        prepare_data(block)
