"""The keys of a DeepSpeed JSON and their types.

DeepSpeed checks some blocks itself and silently ignores a misspelt key elsewhere. Where it has a pydantic model the
installed version's is used, so that the schema cannot fall behind; the blocks it reads key by key are written down
here (DeepSpeed 0.19).
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Annotated, Any

import torch
from deepspeed.autotuning import constants as autotuning_constants
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DtypeEnum, HybridEngineConfig
from deepspeed.runtime.data_pipeline import constants as data_pipeline_constants
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import log_levels
from pydantic import AfterValidator, model_validator

from narrowgauge.optimizers import OPTIMIZERS

from ...config.blocks import Block, Count, Flag, Number
from ...config.config import Config
from ...config.engine_keys import EngineKeys
from ...config.optimizer_params import our_only
from ...config.problems import unknown_names
from ...errors import did_you_mean
from .schedules import schedule_problems

# What DeepSpeed asks of optimizers it does not know, ours: whatever the configuration says.
FORCED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def _one_of(*words: str, any_case: bool = False) -> AfterValidator:
    """For a word that DeepSpeed looks up only when it builds its engine."""

    def check(value: str | None) -> str | None:
        if value is not None and (value.lower() if any_case else value) not in words:
            raise ValueError(f"expected one of {', '.join(words)}, got {value!r}{did_you_mean(value, words)}")
        return value

    return AfterValidator(check)


_PRECISIONS = tuple(name for name in DtypeEnum._value2member_map_ if isinstance(name, str))
_Precision = Annotated[str | None, _one_of(*_PRECISIONS)]
_Reduced = Annotated[str | None, _one_of("fp32", "fp16", "bf16", any_case=True)]


class SchedulerBlock(Block):
    type: str
    params: dict[str, Any] = {}


class ActivationCheckpointing(Block):
    partition_activations: Flag = False
    cpu_checkpointing: Flag = False
    contiguous_memory_optimization: Flag = False
    number_checkpoints: Count | None = None
    synchronize_checkpoint_boundary: Flag = False
    profile: Flag = False


class FlopsProfiler(Block):
    enabled: Flag = False
    recompute_fwd_factor: Number = 0.0
    profile_step: Count = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: Flag = True
    output_file: str | None = None


class Aio(Block):
    block_size: Count = 1048576
    queue_depth: Count = 8
    intra_op_parallelism: Count = 1
    single_submit: Flag = False
    overlap_events: Flag = True
    use_gds: Flag = False


class ParallelWrite(Block):
    pipeline_stage: Flag = False


class CheckpointWriter(Block):
    type: str | None = None
    io_buffer_size: int | None = None
    io_buffer_double: Flag | None = None
    show_statistics: Flag | None = None
    data_parallel: str | None = None
    decoupled: Flag | None = None
    io_multiplier: int | None = None


class Checkpoint(Block):
    tag_validation: Annotated[str, _one_of("ignore", "warn", "fail", any_case=True)] = "Warn"
    load_universal: Flag = False
    use_node_local_storage: Flag = False
    checkpoint_serialization: Flag | None = None
    writer: CheckpointWriter | None = None
    parallel_write: ParallelWrite | None = None


class DataTypes(Block):
    grad_accum_dtype: _Precision = None
    param_dtype: _Precision = None
    buffer_dtype: _Precision = None
    keep_in_fp32_modules: str | list[str] | None = "auto"


class TorchAutocast(Block):
    enabled: Flag = False
    dtype: _Precision = "bfloat16"
    lower_precision_safe_modules: list[str] | None = None


class Timers(Block):
    throughput: DeepSpeedThroughputTimerConfig | None = None


class Pipeline(Block):
    stages: str | int = "auto"
    partition: str = "best"
    seed_layers: Flag = False
    activation_checkpoint_interval: int = 0
    pipe_partitioned: Flag = True
    grad_partitioned: Flag = True
    use_reentrant: Flag | None = None


def _only_words_of(module: ModuleType, *free: str) -> AfterValidator:
    """For blocks with a deep structure of their own: every key must be one of the words DeepSpeed's module defines.

    Args:
        free: keys below which the user chooses the names.
    """
    words = {value for value in vars(module).values() if isinstance(value, str)}

    def check(block: dict[str, Any], path: str = "") -> dict[str, Any]:
        for key, value in block.items():
            if key not in words:
                raise ValueError(f"unknown key {path + key!r}{did_you_mean(key, words)}")
            children = value.values() if key in free and isinstance(value, dict) else [value]
            for child in children:
                if isinstance(child, dict):
                    check(child, f"{path}{key}.")
        return block

    return AfterValidator(check)


class DeepSpeedKeys(EngineKeys):
    """Every top-level key of a DeepSpeed configuration."""

    managed_gradient_accumulation: Flag = True
    scheduler: SchedulerBlock | None = None
    zero_optimization: DeepSpeedZeroConfig | None = None
    zero_allow_untested_optimizer: Flag | None = None
    zero_force_ds_cpu_optimizer: Flag | None = None
    fp16: DeepSpeedFP16Config | None = None
    bf16: DeepSpeedBF16Config | None = None
    bfloat16: DeepSpeedBF16Config | None = None
    torch_autocast: TorchAutocast | None = None
    data_types: DataTypes | None = None
    communication_data_type: _Reduced = None
    seq_parallel_communication_data_type: _Reduced = None
    sequence_parallel_size: Count | None = None
    data_parallel_size: Count | None = None
    prescale_gradients: Flag = False
    gradient_predivide_factor: Number = 1.0
    gradient_allreduce_op: Annotated[str, _one_of("mean", "sum", any_case=True)] = "mean"
    steps_per_print: int | float | None = None
    wall_clock_breakdown: Flag = False
    memory_breakdown: Flag = False
    dump_state: Flag = False
    disable_allgather: Flag = False
    disable_python_gc: Flag = False
    dataloader_drop_last: Flag = False
    vocabulary_size: Count | None = None
    use_data_before_expert_parallelism: Flag = False
    log_level: Annotated[str | None, _one_of(*log_levels, any_case=True)] = None
    activation_checkpointing: ActivationCheckpointing | None = None
    flops_profiler: FlopsProfiler | None = None
    comms_logger: CommsLoggerConfig | None = None
    tensorboard: TensorBoardConfig | None = None
    wandb: WandbConfig | None = None
    comet: CometConfig | None = None
    csv_monitor: CSVConfig | None = None
    timers: Timers | None = None
    aio: Aio | None = None
    checkpoint: Checkpoint | None = None
    compile: CompileConfig | None = None
    pipeline: Pipeline | None = None
    hybrid_engine: HybridEngineConfig | None = None
    tensor_parallel: TPTrainingConfig | None = None
    expert_parallel: dict[str, Any] | None = None
    weight_quantization: dict[str, Any] | None = None
    datastates_ckpt: dict[str, Any] | None = None
    data_efficiency: Annotated[dict[str, Any], _only_words_of(data_pipeline_constants, "curriculum_metrics")] | None = (
        None
    )
    autotuning: Annotated[dict[str, Any], _only_words_of(autotuning_constants, "arg_mappings")] | None = None

    @model_validator(mode="after")
    def _as_applied(self) -> "DeepSpeedKeys":
        """A run records what DeepSpeed is told, not what the file says."""
        if self.optimizer is not None and self.optimizer.type in OPTIMIZERS:
            for key, value in FORCED.items():
                setattr(self, key, value)
        return self

    @classmethod
    def problems_in(cls, raw: Mapping[str, Any]) -> list[str]:
        problems = []
        optimizer, scheduler = raw.get("optimizer"), raw.get("scheduler")
        if isinstance(optimizer, dict) and isinstance(optimizer.get("type"), str):
            name, params = optimizer["type"], optimizer.get("params", {})
            if name not in OPTIMIZERS:
                own = {key: value for key, value in params.items() if key not in our_only()} if params else {}
                problems += _name_problems("optimizer", name, own, optimizer_parameters, lambda _: ())
        if isinstance(scheduler, dict) and isinstance(scheduler.get("type"), str):
            problems += _name_problems(
                "scheduler",
                scheduler["type"],
                scheduler.get("params", {}),
                scheduler_parameters,
                scheduler_requirements,
            )
        problems += schedule_problems(raw)
        training = raw.get("training")
        if isinstance(training, dict) and training.get("lr_schedule") and scheduler:
            problems.append("training.lr_schedule and scheduler are two learning-rate schedules; one is allowed")
        return problems


def deepspeed_keys(config: Config) -> DeepSpeedKeys:
    """The keys of a configuration that was read for this engine."""
    assert isinstance(config.parsed, DeepSpeedKeys)
    return config.parsed


def _name_problems(
    block: str,
    name: str,
    params: Any,
    allowed_of: Callable[[str], set[str] | None],
    required_of: Callable[[str], Iterable[str]],
) -> list[str]:
    try:
        allowed = allowed_of(name)
    except ValueError as error:
        return [f"{block}.type: {error}"]
    if allowed is None or not isinstance(params, dict):
        return []
    needed = [
        f"{block}.params.{key}: expected this key for {name}, got none"
        for key in required_of(name)
        if key not in params
    ]
    return unknown_names(f"{block}.params", name, params, allowed) + needed


def optimizer_parameters(name: str) -> set[str] | None:
    """The parameter names of a DeepSpeed or torch optimizer; None for one that only DeepSpeed knows the signature of.

    Raises:
        ValueError: there is no such optimizer.
    """
    lowered = name.lower()
    ours = {own.lower(): own for own in OPTIMIZERS}
    if lowered in ours:
        # DeepSpeed does not mind the case of its own names, so "lamb" would be another optimizer than "Lamb".
        raise ValueError(f"{name!r} is not a known optimizer; did you mean {ours[lowered]!r}?")
    if lowered in ("adam", "adamw"):
        classes = (FusedAdam, DeepSpeedCPUAdam, torch.optim.AdamW)
        return set().union(*map(_parameters, classes), {"torch_adam", "adam_w_mode"}) - {"model_params", "params"}
    if lowered in DEEPSPEED_OPTIMIZERS:
        return None
    optimizer = getattr(torch.optim, name, None)
    if not (inspect.isclass(optimizer) and issubclass(optimizer, torch.optim.Optimizer)):
        known = sorted({*DEEPSPEED_OPTIMIZERS, *OPTIMIZERS, "AdamW", "SGD"})
        hint = did_you_mean(name, known)
        raise ValueError(f"{name!r} is not a known optimizer{hint}; known are {known} and torch's own")
    return _parameters(optimizer) - {"params"}


def scheduler_parameters(name: str) -> set[str]:
    """The parameter names of a DeepSpeed or torch learning-rate schedule.

    Raises:
        ValueError: there is no such schedule.
    """
    return _parameters(_scheduler(name)) - {"optimizer"}


def scheduler_requirements(name: str) -> list[str]:
    """Those of them without a default."""
    parameters = inspect.signature(_scheduler(name)).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD][1:]


def _scheduler(name: str) -> type:
    scheduler = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if not inspect.isclass(scheduler):
        known = sorted(lr_schedules.VALID_LR_SCHEDULES)
        hint = did_you_mean(name, known)
        raise ValueError(f"{name!r} is not a known schedule{hint}; known are {known} and torch's own")
    return scheduler


def _parameters(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters)
