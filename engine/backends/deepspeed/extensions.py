"""Building DeepSpeed's extensions before they are needed."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from rich.console import Console

from narrowgauge.offload.backends import BACKENDS
from narrowgauge.offload.backends.deepspeed_build import build_extension, is_compiled

from ...config.config import Config


def ensure_extensions(config: Config | None = None, console: Console | None = None, *, aio: bool = False) -> list[str]:
    """Build what a run loads on this machine's kind of accelerator; returns the names of the extensions.

    On the CPU every run loads DeepSpeed's shared-memory communication (20 to 50 s, once). DeepSpeed's own optimizers
    bring their kernels; ours need none.

    Args:
        config: of the run; None builds what all runs load.
        console: where a build that is about to start is announced.
        aio: also what activation offload can use instead of its own threads (minutes, once; needs libaio-dev).
    """
    offload = config.offload() if config is not None else None
    names = []
    for builder in _builders(_of_optimizer(config) if config is not None else []):
        build_extension(builder, announce=partial(_announce, console))
        names.append(builder.name)
    for name, backend in BACKENDS.items():
        if (aio and backend.needs_build) or (offload is not None and offload.backend == name):
            names += backend.build(partial(_announce, console))
    return names


def uncompiled_extensions() -> list[str]:
    """Of the extensions that every run loads on this machine, those that are not compiled for this environment."""
    package = Path(deepspeed.__file__).parent
    names = [builder.name for builder in _builders() if not installed_ops.get(builder.name)]
    return [name for name in names if not is_compiled(name, package)]


def _builders(more: Sequence[str] = ()) -> list[Any]:
    """DeepSpeed's builders of what every run loads, and of ``more``, as far as this accelerator has them."""
    accelerator: Any = get_accelerator()
    wanted = ["ShareMemCommBuilder"] if accelerator.device_name() == "cpu" else []
    return [builder for name in (*wanted, *more) if (builder := accelerator.create_op_builder(name)) is not None]


def _of_optimizer(config: Config) -> list[str]:
    """The builder of the kernel that DeepSpeed takes for its own optimizer of this configuration."""
    block, zero = config.parsed.optimizer, config.parsed.zero_optimization
    if block is None or config.optimizer_options is not None or block.params.get("torch_adam"):
        return []
    # The megatron engine's block has none.
    offloaded: Any = getattr(zero, "offload_optimizer", None)
    on_cpu = offloaded is not None and offloaded.device != "none"
    kernels = {"adam": "Adam", "adamw": "Adam", "lion": "Lion", "lamb": "Lamb"}
    kernel = kernels.get(block.type.lower())
    if kernel is None:
        return []
    return [f"CPU{kernel}Builder" if on_cpu and kernel != "Lamb" else f"Fused{kernel}Builder"]


def _announce(console: Console | None, what: str) -> None:
    if console is not None:
        console.print(what, highlight=False)
