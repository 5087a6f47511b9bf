"""Writes ``names.json``, the keys of a configuration: ``python -m narrowgauge.engine.config.names``."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from narrowgauge.optimizers import OPTIMIZERS
from narrowgauge.optimizers.options import options_of

from ..backends import backend_of, engine_names
from .config import RunConfig
from .problems import model_in
from .spelling import digest_of_sources

FILE = Path(__file__).with_name("names.json")


def all_names() -> dict[str, Any]:
    """The keys of each engine's configurations, nested; null where other keys are allowed, or none are blocks.

    Those of DeepSpeed's own blocks are apart: another version may have others.
    """
    engines, of_deepspeed = {}, {}
    for engine in engine_names():
        own, theirs = _names_of(RunConfig), {}
        for key, node in _names_of(backend_of(engine).keys).items():
            is_theirs = _is_deepspeeds(backend_of(engine).keys, key)
            own[key] = None if is_theirs else node
            if is_theirs:
                theirs[key] = node
        engines[engine] = own
        of_deepspeed |= theirs
    return {
        "sources": digest_of_sources(),
        "engines": engines,
        "deepspeed": {"version": version("deepspeed"), "blocks": of_deepspeed},
        "optimizers": {name: [o.name for o in options_of(cls.options_type)] for name, cls in OPTIMIZERS.items()},
    }


def _names_of(model: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = model_in(field.annotation)
        node = None
        if inner is not None and inner.model_config.get("extra") == "forbid":
            node = _names_of(inner)
        for key in (name, field.alias):
            if key is not None:
                found[key] = node
    return found


def _is_deepspeeds(model: type[BaseModel], key: str) -> bool:
    field = next((f for name, f in model.model_fields.items() if key in (name, f.alias)), None)
    inner = model_in(field.annotation) if field is not None else None
    return inner is not None and inner.__module__.startswith("deepspeed")


if __name__ == "__main__":
    FILE.write_text(json.dumps(all_names(), indent=1) + "\n")
