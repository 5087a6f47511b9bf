"""The engine: ``initialize``, and what ``narrowgauge train`` is made of."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.deepspeed.engine import Engine
    from .backends.deepspeed.initialize import initialize

__all__ = ["Engine", "initialize"]


def __getattr__(name: str) -> Any:
    """Import torch and DeepSpeed only when they are needed: a command's help should not wait for them."""
    if name == "initialize":
        from .backends.deepspeed.initialize import initialize

        return initialize
    if name == "Engine":
        from .backends.deepspeed.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
