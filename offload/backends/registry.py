"""The backends by name. A backend is a file of this folder whose class is registered."""

from typing import TypeVar

from .base import Backend

AUTO = "auto"
BACKENDS: dict[str, type[Backend]] = {}
Class = TypeVar("Class", bound=type[Backend])


def register(backend: Class) -> Class:
    """Class decorator: let ``backend=`` and the configuration choose it by its name, and ``auto`` consider it.

    Raises:
        ValueError: the name is taken.
    """
    name = backend.name
    if name == AUTO or BACKENDS.setdefault(name, backend) is not backend:
        raise ValueError(f"backend: expected a new name, got {name!r}, which is registered already")
    return backend


def backend_names() -> list[str]:
    """What ``backend=`` may be: ``auto`` or a registered name."""
    return [AUTO, *sorted(BACKENDS)]
