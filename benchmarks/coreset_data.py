"""A mixture with rare sources, from tables of Python's standard library: prompts and completions, a file per source."""

import errno
import json
import mimetypes
import random
import unicodedata
from dataclasses import dataclass
from encodings.aliases import aliases
from html.entities import html5
from http import HTTPStatus
from pathlib import Path

Pair = tuple[str, str]
_SPLIT_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Examples of the two large sources at most, and how many of a source are held out."""

    characters: int = 5000
    entities: int = 1500
    held_out: int = 100


def pairs(sizes: Sizes) -> dict[str, list[Pair]]:
    """By source, in an order that is drawn; the last four are rare."""
    named = ((code, unicodedata.name(chr(code), "")) for code in range(0x21, 0x3000))
    sources = {
        "characters": [(f"U+{code:04X} is", f" {name}") for code, name in named if name],
        "entities": [(f"&{name} is", f" U+{ord(text):04X}") for name, text in html5.items() if len(text) == 1],
        "aliases": [(f"codec {alias} means", f" {codec}") for alias, codec in aliases.items()],
        "errors": [(f"error {number} is", f" {name}") for number, name in errno.errorcode.items()],
        "types": [(f"a {ending} file is", f" {kind}") for ending, kind in mimetypes.types_map.items()],
        "statuses": [(f"status {one.value} is", f" {one.phrase}: {one.description}") for one in HTTPStatus],
    }
    most = {"characters": sizes.characters, "entities": sizes.entities}
    for name, found in sources.items():
        found.sort()
        random.Random(_SPLIT_SEED).shuffle(found)
        del found[most.get(name, len(found)) :]
    return sources


def write_sources(folder: Path, sizes: Sizes) -> tuple[dict[str, Path], dict[str, Path]]:
    """JSON Lines of each source to train on, and to validate with: a fifth of a source, but at most ``held_out``."""
    folder.mkdir(parents=True, exist_ok=True)
    sides: tuple[dict[str, Path], dict[str, Path]] = ({}, {})
    for name, found in pairs(sizes).items():
        held = min(sizes.held_out, len(found) // 5)
        for side, part, kind in zip(sides, (found[held:], found[:held]), ("train", "held"), strict=True):
            side[name] = folder / f"{name}-{kind}.jsonl"
            records = ({"prompt": prompt, "completion": completion} for prompt, completion in part)
            side[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    return sides
