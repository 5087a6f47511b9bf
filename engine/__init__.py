"""The engine: ``initialize``, and what ``narrowgauge train`` is made of."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .initialization import initialize
    from .zero_engine import Engine

__all__ = ["Engine", "initialize"]


def __getattr__(name: str) -> Any:
    """Import torch and DeepSpeed only when they are needed: a command's help should not wait for them."""
    if name == "initialize":
        from .initialization import initialize

        return initialize
    if name == "Engine":
        from .zero_engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
