"""Ways to move bytes between host memory and a slab, behind one protocol; every file here may register one."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Backend, IOBackend, Lane
from .choice import available_backends, make_backend
from .registry import BACKENDS, backend_names, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "BACKENDS",
    "Backend",
    "IOBackend",
    "Lane",
    "available_backends",
    "backend_names",
    "make_backend",
    "register",
]
