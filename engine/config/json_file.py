"""Reading a JSON configuration and applying ``--set`` to it. Light to import: no torch, no DeepSpeed."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hjson

from ..errors import ConfigError

_TOO_DEEP = "it is nested too deeply"
_DEEPEST = 100


class _TwiceError(ValueError):
    """A key stands twice in one object."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; comments and trailing commas are allowed, as in DeepSpeed.

    Raises:
        ConfigError: it cannot be read or parsed, or a key stands twice in one object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from error
    try:
        raw = hjson.loads(text, object_pairs_hook=_without_duplicates)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(str(path), [f"line {error.lineno}, column {error.colno}: {error.msg}"]) from error
    except RecursionError as error:
        raise ConfigError(str(path), [_TOO_DEEP]) from error
    except _TwiceError as error:
        raise ConfigError(str(path), [str(error)]) from error
    except (ValueError, OverflowError) as error:
        raise ConfigError(str(path), [_of_a_number(text) or str(error)]) from error
    if not isinstance(raw, dict):
        raise ConfigError(str(path), [f"expected a JSON object, got {type(raw).__name__}"])
    return raw


def _of_a_number(text: str) -> str | None:
    """What is wrong with the first number that is too large for a float or, in digits, for an integer."""
    most_digits = sys.get_int_max_str_digits() or math.inf
    for match in re.finditer(r"\d[\d.]*(?:[eE][+-]?\d+)?", text):
        number = match[0]
        if len(number) > most_digits or (number.count(".") < 2 and math.isinf(float(number))):
            shown = number if len(number) <= 20 else f"{number[:10]}... of {len(number):,} characters"
            return f"line {text.count(chr(10), 0, match.start()) + 1}: expected a finite number, got {shown}"
    return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply ``a.b=value`` each, the value in JSON or a bare string, to a configuration in place.

    Raises:
        ConfigError: an override is not of this form, or leads through a value that is no object.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError("--set", [f"expected key.path=value, got {override!r}"])
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        except ValueError as error:
            raise ConfigError("--set", [f"{path}: expected a number of fewer digits, got {len(text):,}"]) from error
        except RecursionError as error:
            raise ConfigError("--set", [f"{path}: {_TOO_DEEP}"]) from error
        *parents, last = path.split(".")
        if len(parents) > _DEEPEST:
            raise ConfigError("--set", [f"{path[:40]}...: {_TOO_DEEP}"])
        node = raw
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ConfigError("--set", [f"{path}: {key!r} holds {node!r}, which has no keys"])
        node[last] = value


def copied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON would hold it.

    Raises:
        ConfigError: it holds what JSON does not.
    """
    try:
        return json.loads(json.dumps(config))
    except RecursionError as error:
        raise ConfigError("config", [_TOO_DEEP]) from error
    except TypeError as error:
        raise ConfigError("config", [f"expected JSON values: {error}"]) from error


# What keys begin with that people, and their editors, write for themselves.
_COMMENTS = ("_comment", "__comment", "_note", "_doc", "_description", "//", "#", "$schema", "$comment")


def without_comments(value: Any) -> Any:
    """A configuration without keys that are comments, such as ``_comment`` and ``//``."""
    if isinstance(value, dict):
        kept = {key: child for key, child in value.items() if not str(key).startswith(_COMMENTS)}
        return {key: without_comments(child) for key, child in kept.items()}
    return [without_comments(child) for child in value] if isinstance(value, list) else value


def digest(raw: dict[str, Any]) -> str:
    """A hash of a configuration's contents, whatever their order."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """Dotted paths and their values as JSON text, for comparing and naming."""
    if isinstance(value, dict) and value:
        parts = ((f"{path}.{key}" if path else key, child) for key, child in value.items())
        return {key: text for name, child in parts for key, text in flatten(child, name).items()}
    return {path: json.dumps(value)}
