"""Which DeepSpeed settings our optimizers work under; the others are refused before anything starts."""

from importlib.util import find_spec
from typing import Any

from torch import nn

from narrowgauge.optimizers import OPTIMIZERS, EngineOptimizer

from ...config.config import Config
from .keys import deepspeed_keys


def check_training(config: Config) -> None:
    """Refuse what ``narrowgauge train`` cannot do with any optimizer, then what it cannot do with the configured one.

    Raises:
        ConfigError: naming each setting, why it does not work, and what to use instead.
    """
    check_installed(config)
    check_offload_supported(config)
    problems = [f"{key}: {reason}" for key, reason in _unsupported_by_checkpoints(config)]
    if not deepspeed_keys(config).managed_gradient_accumulation:
        problems.append("managed_gradient_accumulation: expected true, got false: a step takes its micro-batches")
    if config.optimizer_options is not None:
        check_supported(config)
    if problems:
        raise config.error(*problems)


def check_installed(config: Config) -> None:
    """Refuse monitors whose packages DeepSpeed would miss while it makes its engine.

    Raises:
        ConfigError: naming the package.
    """
    packages = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}
    blocks = {key: getattr(config.parsed, key) for key in packages}
    problems = [
        f"{key}.enabled: expected the package {packages[key]}, got none: pip install {packages[key]}"
        for key, block in blocks.items()
        if block is not None and block.enabled and find_spec(packages[key]) is None
    ]
    if problems:
        raise config.error(*problems)


def check_offload_supported(config: Config) -> None:
    """Refuse settings in which DeepSpeed plans the memory of activations itself.

    Raises:
        ConfigError: naming the setting.
    """
    compile_keys = deepspeed_keys(config).compile
    if config.offload() is not None and compile_keys is not None and compile_keys.deepcompile:
        raise config.error("compile.deepcompile: does not work with activation_offload: it plans memory itself")


def check_supported(
    config: Config, model: nn.Module | None = None, mpu: Any = None, *, client: EngineOptimizer | None = None
) -> None:
    """Refuse combinations in which one of our optimizers would train wrongly, or has never been tested.

    Args:
        client: an optimizer that is not the configuration's.

    Raises:
        ConfigError: naming each setting, why it does not work, and what to use instead.
    """
    if client is not None:
        cls, options = type(client), client.options
    else:
        assert config.parsed.optimizer is not None
        options = config.optimizer_options
        assert options is not None
        cls = OPTIMIZERS[config.parsed.optimizer.type].class_for(options)
    name = cls.type_name
    problems = [f"{key}: does not work with {name}: {reason}" for key, reason in _unsupported(config)]
    problems += [f"optimizer.params.{problem}" for problem in cls.unsupported_in_engine(options, sharded=True)]
    if mpu is not None:
        problems.append(f"mpu: does not work with {name}: model parallelism is not supported yet")
    if model is not None and type(model).__name__ == "PipelineModule":
        problems.append(f"model: does not work with {name}: pipeline parallelism is not supported yet")
    if config.zero_stage != 3 and model is not None and any(hasattr(p, "ds_id") for p in model.parameters()):
        problems.append(
            f"zero_optimization.stage: expected 3 for a model built under deepspeed.zero.Init, got {config.zero_stage}"
        )
    if model is not None and any(not getattr(p, "allreduce", True) for p in model.parameters()):
        problems.append(f"model: does not work with {name}: mixture of experts is not supported yet")
    if problems:
        raise config.error(*problems)


def _unsupported(config: Config) -> list[tuple[str, str]]:
    parsed, raw = deepspeed_keys(config), config.raw
    found: list[tuple[str, str]] = []
    if parsed.fp16 is not None and parsed.fp16.enabled:
        found.append(("fp16.enabled", "fp16 loss scaling is not supported, use bf16"))
    found += _unsupported_by_checkpoints(config)
    if parsed.torch_autocast is not None and parsed.torch_autocast.enabled:
        found.append(("torch_autocast.enabled", "use bf16"))
    kept = parsed.data_types.keep_in_fp32_modules if parsed.data_types is not None else None
    if kept and isinstance(kept, list):
        found.append(("data_types.keep_in_fp32_modules", "all modules have one precision; leave it out"))
    bf16: Any = parsed.bf16 or parsed.bfloat16
    if bf16 is not None and (bf16.bf16_master_weights_and_grads or bf16.bf16_optimizer_states):
        found.append(("bf16", "masters and moments are kept in fp32"))
    if parsed.compile is not None and parsed.compile.deepcompile:
        found.append(("compile.deepcompile", "it rewrites the graph of the layers"))
    if parsed.hybrid_engine is not None and parsed.hybrid_engine.enabled:
        found.append(("hybrid_engine.enabled", "it replaces the layers"))
    if parsed.checkpoint is not None and parsed.checkpoint.load_universal:
        found.append(("checkpoint.load_universal", "DeepSpeed's universal form drops frozen weights"))
    for key in ("tensor_parallel", "expert_parallel", "weight_quantization"):
        if raw.get(key):
            found.append((key, "not supported yet"))
    if (parsed.sequence_parallel_size or 1) > 1:
        found.append(("sequence_parallel_size", "not supported yet"))
    return found + _unsupported_zero(config)


def _unsupported_by_checkpoints(config: Config) -> list[tuple[str, str]]:
    """Settings under which DeepSpeed keeps masters where nobody else finds them."""
    parsed = deepspeed_keys(config)
    low_precision = {"bf16.enabled": config.bf16, "fp16.enabled": parsed.fp16 is not None and parsed.fp16.enabled}
    found = [
        (key, "without ZeRO DeepSpeed takes another optimizer path, set zero_optimization.stage to 1")
        for key, enabled in low_precision.items()
        if enabled and config.zero_stage == 0
    ]
    offload = config.parsed.zero_optimization.offload_optimizer if config.parsed.zero_optimization else None
    if offload is not None and offload.device == "nvme":
        found.append(("zero_optimization.offload_optimizer.device", "nvme is not supported yet, use cpu"))
    return found


def _unsupported_zero(config: Config) -> list[tuple[str, str]]:
    zero: Any = config.parsed.zero_optimization
    if zero is None:
        return []
    found: list[tuple[str, str]] = []
    optimizer, parameters = zero.offload_optimizer, zero.offload_param
    if optimizer is not None and optimizer.ratio != 1.0:
        found.append(("offload_optimizer.ratio", "expected 1.0, the rest would run DeepSpeed's own Adam"))
    if optimizer is not None and optimizer.super_offload:
        found.append(("offload_optimizer.super_offload", "it runs DeepSpeed's own Adam"))
    if parameters is not None and parameters.device == "nvme":
        found.append(("offload_param.device", "nvme is not supported yet, use cpu"))
    if zero.zero_hpz_partition_size > 1:
        found.append(("zero_hpz_partition_size", "expected 1, secondary shards would not see the folded weights"))
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if getattr(zero, key):
            found.append((key, "the frozen weights hold trained values"))
    if zero.round_robin_gradients:
        found.append(("round_robin_gradients", "DeepSpeed's fragment map does not follow the reordering"))
    if zero.zenflow is not None:
        found.append(("zenflow", "not supported yet"))
    return [(f"zero_optimization.{key}", reason) for key, reason in found]
