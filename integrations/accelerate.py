"""Accelerate: ``accelerator.prepare`` makes narrowgauge's engine where it would make DeepSpeed's."""

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from narrowgauge.engine import initialize
from narrowgauge.engine.errors import ConfigError
from narrowgauge.engine.ranks.environment import world_size
from narrowgauge.optimizers import EngineOptimizer

# Accelerate looks for "auto" everywhere in the file, and would refuse those of this block, which are narrowgauge's.
_OWN_BLOCK = "activation_offload"
_NEVER = 1 << 62
_SWITCH = "ACCELERATE_USE_DEEPSPEED"


def prepare_accelerator(accelerator: Accelerator) -> Accelerator:
    """Let ``accelerator.prepare`` make engines by :func:`narrowgauge.engine.initialize`, where DeepSpeed is used.

    The DeepSpeed file, or the plugin's configuration, may then name one of :mod:`narrowgauge.optimizers` and have an
    ``activation_offload`` block, and an optimizer of ours that was made from the model may be passed to ``prepare``.
    Alone and under DistributedDataParallel there is nothing to change: make the optimizer from the model, and pass both
    to ``prepare``.

    Returns:
        The same accelerator.

    Raises:
        ConfigError: it shards models in a way that our optimizers do not work under.
    """
    if hasattr(accelerator, "narrowgauge_blocks"):
        return accelerator
    kind = str(accelerator.distributed_type.value)
    if kind in ("FSDP", "MEGATRON_LM", "TP"):
        raise ConfigError("accelerator", [f"distributed_type: expected DeepSpeed, DDP or one process, got {kind}"])
    if problem := ranks_problem(accelerator.num_processes):
        raise ConfigError("accelerator", [problem])
    blocks = {}
    if kind == "DEEPSPEED":
        config = deepspeed_config(accelerator)
        if _OWN_BLOCK in config:
            blocks[_OWN_BLOCK] = config.pop(_OWN_BLOCK)
    prepare = accelerator.prepare

    @wraps(prepare)
    def prepare_with_narrowgauge(*args: Any, **kwargs: Any) -> Any:
        if kind != "DEEPSPEED":
            return prepare(*args, **kwargs)
        if any(isinstance(each, EngineOptimizer) for each in args):
            # Else Accelerate takes DeepSpeed's own Adam on the CPU in its place.
            deepspeed_config(accelerator)["zero_force_ds_cpu_optimizer"] = False
        with narrowgauge_initializes(blocks):
            return prepare(*args, **kwargs)

    vars(accelerator).update(prepare=prepare_with_narrowgauge, narrowgauge_blocks=blocks)
    return accelerator


def deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    """What the plugin will pass to DeepSpeed; for an accelerator that uses it."""
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.deepspeed_config


@contextmanager
def narrowgauge_initializes(blocks: dict[str, Any]) -> Iterator[None]:
    """``deepspeed.initialize``, which Accelerate and Lightning look up when they need it, is narrowgauge's.

    Args:
        blocks: further blocks of the configuration.
    """
    original = deepspeed.initialize

    def initialize_instead(
        *, config: dict[str, Any] | None = None, config_params: dict[str, Any] | None = None, **given: Any
    ) -> tuple[Any, Any, Any, Any]:
        settings = config if config is not None else config_params or {}
        if getattr(given.get("args"), "device_rank", 0) is None:
            # Lightning's on CPUs.
            given["args"] = None
        if "optimizer" not in settings and given.get("optimizer") is None:
            # Inference under ZeRO-3.
            return original(config=settings, **given)
        # Which calls DeepSpeed's own for optimizers that are not narrowgauge's.
        deepspeed.initialize = original
        try:
            return initialize(config=_in_json(settings) | blocks, **given)
        finally:
            deepspeed.initialize = initialize_instead

    deepspeed.initialize = initialize_instead
    try:
        yield
    finally:
        deepspeed.initialize = original


def _in_json(config: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration in JSON's numbers; Accelerate says "never" as infinity."""
    settings = copy.deepcopy(config)
    if settings.get("steps_per_print") == math.inf:
        settings["steps_per_print"] = _NEVER
    return settings


def ranks_problem(known: int) -> str | None:
    """What is wrong where Accelerate does not know of the launcher's process ranks: each would train alone."""
    if known == world_size():
        return None
    return (
        f"num_processes: expected the launcher's {world_size()} process ranks, got {known}, so each would train alone:"
        " on CPUs pass use_cpu=True (of Accelerator: cpu=True), and with DeepSpeed call"
        " narrowgauge.integrations.accelerate.cpu_ranks() before"
    )


def cpu_ranks() -> dict[str, Any] | None:
    """Before ``TrainingArguments`` or ``Accelerator``: DeepSpeed's process ranks on a machine without a GPU.

    Accelerate (1.15) gives DeepSpeed's ranks a backend on GPUs only; on CPUs each would train alone. To be passed on:
    ``TrainingArguments(accelerator_config=cpu_ranks(), deepspeed=...)``.

    Returns:
        The ``accelerator_config`` to use; None on GPUs, and without a launcher, where there is nothing to do.
    """
    if torch.cuda.is_available() or "LOCAL_RANK" not in os.environ:
        return None
    AcceleratorState._reset_state(reset_partial_state=True)
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "true"
    try:
        PartialState(backend="gloo")
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
    return {"use_configured_state": True}
