"""Ways to move bytes between host memory and a slab, behind one protocol."""

from .base import IOBackend, Lane
from .choice import BackendName, available_backends, make_backend

__all__ = ["BackendName", "IOBackend", "Lane", "available_backends", "make_backend"]
