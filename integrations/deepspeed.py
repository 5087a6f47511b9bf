"""DeepSpeed's module with narrowgauge's ``initialize``: a training script changes its import and nothing else.

``from narrowgauge.integrations import deepspeed`` in the place of ``import deepspeed``: a configuration that names
``Grass`` or another of :mod:`narrowgauge.optimizers`, or has an ``activation_offload`` block, is honoured; everything
but ``initialize`` is DeepSpeed's own.
"""

from typing import Any

import deepspeed

from narrowgauge.engine import initialize

__all__ = ["initialize"]


def __getattr__(name: str) -> Any:
    return getattr(deepspeed, name)


def __dir__() -> list[str]:
    return sorted({*dir(deepspeed), *globals()})
