"""Ways to move bytes between host memory and a slab, behind one protocol."""

from .base import IOBackend, Lane
from .choice import NAMES, available_backends, make_backend

__all__ = ["NAMES", "IOBackend", "Lane", "available_backends", "make_backend"]
