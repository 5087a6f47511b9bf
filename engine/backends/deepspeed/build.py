"""A run's DeepSpeed engine from its configuration."""

from typing import Any

from torch import nn

from ...config.config import Config
from ...protocol import Schedule
from ...ranks.environment import world_size
from ..matrix_groups import matrix_groups
from .initialize import initialize
from .training import DeepSpeedTraining


def run_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's configuration of a run, with all batch sizes."""
    batches = config.batches(world_size())
    settings = config.engine_settings() | {
        "train_batch_size": batches.total,
        "train_micro_batch_size_per_gpu": batches.micro,
        "gradient_accumulation_steps": batches.accumulation_steps,
    }
    settings.setdefault("steps_per_print", 1 << 62)
    return settings


def build(config: Config, model: nn.Module, *, schedule: Schedule | None) -> DeepSpeedTraining:
    """Make the engine of a run. Collective.

    Raises:
        ConfigError: DeepSpeed, or an optimizer, refuses a setting.
    """
    settings = run_settings(config)
    if config.offload() is not None:
        settings["activation_offload"] = config.raw["activation_offload"]
    groups = None
    if config.optimizer_options is None and config.matrix_factor != 1.0:
        groups = matrix_groups(model, config.raw["optimizer"].get("params", {}), config.matrix_factor)
    engine, *_ = initialize(model=model, config=settings, lr_scheduler=schedule, model_parameters=groups)
    return DeepSpeedTraining(engine)
