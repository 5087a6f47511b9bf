"""What is wrong with a configuration, as sentences."""

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..errors import did_you_mean
from .explained import explained
from .redaction import HIDDEN, redact
from .run_blocks import OWN_BLOCKS


def problems_of(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """Pydantic's errors as ``.path: what was found; what is allowed``."""
    return [_describe(item, schema) for item in error.errors()]


def autos(value: Any, path: str = "") -> Iterable[str]:
    """Hugging Face's Trainer replaces "auto"; here nobody would, and DeepSpeed would silently take its default."""
    if isinstance(value, dict):
        for key, child in value.items():
            if path or key not in OWN_BLOCKS:
                yield from autos(child, f"{path}.{key}" if path else key)
    elif value == "auto" and path not in ("data_types.keep_in_fp32_modules", "pipeline.stages"):
        yield f"{path}: expected a value, got 'auto', which only Hugging Face's Trainer fills in"


def not_finite(value: Any, path: str = "") -> Iterable[str]:
    """Numbers beyond all bounds (``1e400``), NaN; a model's configuration may have them."""
    if isinstance(value, dict):
        for key, child in value.items():
            if path or key != "model":
                yield from not_finite(child, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from not_finite(child, f"{path}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path}: expected a finite number, got {value}"


def strings_for_other_types(raw: Any, parsed: Any, path: str = "") -> Iterable[str]:
    """DeepSpeed's own blocks take "False" for false and "3" for 3, other readers of the same file do not."""
    if isinstance(raw, dict) and isinstance(parsed, BaseModel):
        for key, value in raw.items():
            yield from strings_for_other_types(value, getattr(parsed, key, None), f"{path}.{key}" if path else key)
    elif isinstance(raw, str) and isinstance(parsed, bool | int | float):
        yield f"{path}: expected {json.dumps(parsed)}, got the string {json.dumps(raw)}"


def within(block: str, problem: str) -> str:
    """``key: problem``, as optimizers say it of their options, or ``.path: problem``, with the block before it."""
    text = problem.removeprefix(": ")
    is_of_key = text.startswith(".") or re.match(r"[\w.\[\]]+: ", text)
    return f"{block}{'' if text.startswith('.') else '.' if is_of_key else ': '}{text}"


def unknown_names(block: str, name: str, params: Iterable[str], allowed: Collection[str]) -> list[str]:
    """A problem for each parameter that ``name``, an optimizer or a schedule, does not have."""
    return [
        f"{block}.{key}: unknown key for {name}{explained(key) or did_you_mean(key, allowed)}"
        for key in params
        if key not in allowed
    ]


def _describe(item: Any, schema: type[BaseModel]) -> str:
    """One of pydantic's errors as ``.path: what was found; what is allowed``."""
    # A union's members add their own names to the path; only keys that are in the file are the user's.
    keys = [key for key in item["loc"] if not (isinstance(key, str) and _is_type_name(key))]
    path = "".join(f".{key}" for key in keys)
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key{did_you_mean(str(keys[-1]), _names_at(schema, keys[:-1]))}"
    if item["type"] == "missing":
        return f"{path}: expected this key, got none"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "enum":
        # Two names of DeepSpeed's stages have the same value.
        *others, last = dict.fromkeys(re.split(", | or ", item["ctx"]["expected"]))
        message = f"Input should be {', '.join(others)} or {last}"
    found = item["input"]
    is_secret = HIDDEN in str(redact(found, tuple(map(str, keys))))
    if message.startswith("Input should be "):
        message = f"expected {message.removeprefix('Input should be ')}"
    elif message.startswith("expected ") or isinstance(found, dict | BaseModel):
        return f"{path}: {message}"
    shown = "a value that is not shown" if is_secret else json.dumps(found, default=str)[:60]
    return f"{path}: {message[0].lower()}{message[1:]}, got {shown}"


def _is_type_name(key: str) -> bool:
    return key.startswith(("list[", "literal[", "function-")) or key in ("str", "int", "float", "bool")


def _names_at(schema: type[BaseModel], path: Sequence[Any]) -> set[str]:
    """The keys allowed in the object at ``path``."""
    for key in path:
        if isinstance(key, int):
            continue
        field = next((f for name, f in schema.model_fields.items() if key in (name, f.alias)), None)
        inner = model_in(field.annotation) if field is not None else None
        if inner is None:
            return set()
        schema = inner
    return {alias for name, field in schema.model_fields.items() for alias in (name, field.alias) if alias}


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The block that a key's type allows, if it allows one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := model_in(part))), None)
