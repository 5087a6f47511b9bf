"""Misspelt keys of a configuration, told before the libraries are imported that check the rest. Light to import."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import ConfigError, did_you_mean
from .explained import explained
from .json_file import apply_overrides, read_json, without_comments

_DEFAULT_ENGINE = "deepspeed"
_SOURCES = (
    "engine/config/*.py",
    "engine/backends/*/keys.py",
    "offload/options.py",
    "optimizers/options.py",
    "optimizers/*/options.py",
)


def check_spelling(config: Path, overrides: Sequence[str] = ()) -> None:
    """Refuse keys that no configuration has. What is wrong beside them is told by the whole check.

    Args:
        overrides: ``a.b=value`` each.

    Raises:
        ConfigError: naming all of them, or the file cannot be read.
    """
    raw = without_comments(read_json(config))
    apply_overrides(raw, overrides)
    if problems := list(unknown_keys(raw)):
        raise ConfigError(str(config), problems)


def unknown_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    """``path: unknown key``, with the nearest right one."""
    known: dict[str, Any] = json.loads(Path(__file__).with_name("names.json").read_text())
    if known["sources"] != digest_of_sources():
        # Written before a key was added: the whole check knows it.
        return
    engine = raw.get("engine", _DEFAULT_ENGINE)
    if engine not in known["engines"]:
        names = sorted(known["engines"])
        yield f"engine: expected one of {names}, got {engine!r}{did_you_mean(str(engine), names)}"
        return
    names = known["engines"][engine]
    if engine == _DEFAULT_ENGINE and _installed("deepspeed") == known["deepspeed"]["version"]:
        names = {**names, **known["deepspeed"]["blocks"]}
    yield from _unknown(raw, names, "")
    yield from _of_optimizer(raw.get("optimizer"), known["optimizers"])


def digest_of_sources() -> str:
    """Of the files that say which keys there are."""
    package = Path(__file__).parents[2]
    found = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(package.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _unknown(value: Any, names: Mapping[str, Any] | None, path: str) -> Iterator[str]:
    if names is None:
        return
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _unknown(item, names, f"{path}.{number}")
    elif isinstance(value, dict):
        for key, item in value.items():
            own = f"{path}.{key}" if path else key
            if key not in names:
                yield f"{own}: unknown key{did_you_mean(key, names)}"
            else:
                yield from _unknown(item, names[key], own)


def _of_optimizer(block: Any, optimizers: Mapping[str, list[str]]) -> Iterator[str]:
    if not isinstance(block, dict) or block.get("type") not in optimizers or not isinstance(block.get("params"), dict):
        return
    names = optimizers[block["type"]]
    for key in block["params"]:
        if key not in names:
            yield f"optimizer.params.{key}: unknown key{explained(key) or did_you_mean(key, names)}"
