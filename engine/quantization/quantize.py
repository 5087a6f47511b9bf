"""The ``quantization`` block carried out on a model, before an optimizer is made of it."""

from typing import Any

from torch import nn

from narrowgauge.optimizers.layers.bit_linear import BitLinear, to_bit_linears
from narrowgauge.optimizers.layers.registry import is_target

from ..config.config import Config
from ..config.problems import within
from ..config.quantization_block import QuantizationBlock


def check_quantization(config: Config) -> None:
    """Refuse what quantised layers cannot go with, before anything is built.

    Raises:
        ConfigError: naming each setting.
    """
    parsed = config.parsed
    if parsed.quantization is None:
        return
    problems = []
    if parsed.engine == "megatron":
        problems.append(
            "quantization: expected engine 'deepspeed' or 'ddp', got 'megatron', whose process ranks hold parts of"
            " weights"
        )
    if parsed.lora is not None:
        problems.append("quantization: expected no lora beside it, got one: the weights that are rounded are frozen")
    if problems:
        raise config.error(*problems)


def quantize(model: nn.Module, block: QuantizationBlock) -> None:
    """Let the model's layers compute as the block says.

    Raises:
        ValueError: its globs name no layer.
    """
    to_bit_linears(model, block.target_modules, block.scale)


def quantize_trial(config: Config, model: nn.Module) -> None:
    """As :func:`quantize` does with the block that a configuration has, if any, on a model without storage.

    Raises:
        ConfigError: its globs name no layer.
    """
    if (block := config.parsed.quantization) is not None:
        try:
            quantize(model, block)
        except ValueError as error:
            raise config.error(within("quantization", str(error))) from error


def quantization_record(model: nn.Module, config: Config) -> dict[str, Any] | None:
    """What a run's model computes with, for its records and its export; None without the block."""
    block = config.parsed.quantization
    if block is None:
        return None
    # Also of those that have become compact.
    layers = [name for name, module in model.named_modules() if isinstance(module, BitLinear)]
    return {"method": block.method, "scale": block.scale, "layers": layers}


def describe(model: nn.Module, config: Config) -> str | None:
    """How much of a run's model it is, for people; None without the block."""
    record = quantization_record(model, config)
    if record is None:
        return None
    linears = sum(is_target(module) or isinstance(module, nn.Linear) for module in model.modules())
    return (
        f"quantization: {len(record['layers'])} of {linears} linear layers compute with ternary weights, scaled by the"
        f" {record['scale']} of their magnitudes, and 8-bit inputs"
    )
