"""The engines that train: one folder each, behind :mod:`narrowgauge.engine.protocol`."""

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import did_you_mean

if TYPE_CHECKING:
    from ..protocol import Backend

DEFAULT_ENGINE = "deepspeed"


def engine_names() -> list[str]:
    """The values of ``engine`` in a configuration: the folders here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def backend_of(name: str) -> "Backend":
    """The engine that ``engine`` names in a configuration; only its own packages are imported.

    Raises:
        ValueError: there is none of this name.
    """
    names = engine_names()
    if name not in names:
        hint = did_you_mean(name, names) if isinstance(name, str) else ""
        raise ValueError(f"expected one of {names}, got {name!r}{hint}")
    return import_module(f"{__name__}.{name}").BACKEND
