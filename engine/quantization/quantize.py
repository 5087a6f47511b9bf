"""The ``quantization`` block carried out on a model, before an optimizer is made of it."""

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from narrowgauge.optimizers.layers.float8_quantizer import MULTIPLE, Float8Quantizer
from narrowgauge.optimizers.layers.quantized_linear import QuantizedLinear, quantize_linears
from narrowgauge.optimizers.layers.registry import is_target
from narrowgauge.optimizers.layers.shape import whole_shape
from narrowgauge.optimizers.layers.ternary_quantizer import TernaryQuantizer

from ..config.config import Config
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
    if parsed.quantization.method == "fp8":
        problems += [f"quantization: {problem}" for problem in _without_float8(parsed.quantization)]
    if problems:
        raise config.error(*problems)


def _without_float8(block: QuantizationBlock) -> Iterator[str]:
    """Why this machine has no FP8."""
    if importlib.util.find_spec("torchao") is None:
        yield "expected the package torchao for the method 'fp8', got none: pip install narrowgauge[fp8]"
    if block.emulate:
        return
    if not torch.cuda.is_available():
        yield "expected a GPU for the method 'fp8', got none; emulate true rounds alike, on any device"
        return
    needed, found = ((8, 9) if block.recipe == "tensorwise" else (9, 0)), torch.cuda.get_device_capability()
    if found < needed:
        yield (
            f"expected a GPU of compute capability {needed[0]}.{needed[1]} for the method 'fp8' and recipe"
            f" {block.recipe!r}, got {found[0]}.{found[1]}"
        )


def quantize(model: nn.Module, block: QuantizationBlock) -> None:
    """Let the model's layers compute as the block says.

    Raises:
        ValueError: its globs name no layer, or one that the method cannot multiply by.
    """
    if block.method == "bitnet":
        quantize_linears(model, block.target_modules, partial(TernaryQuantizer, block.scale))
        return
    make = partial(Float8Quantizer, block.recipe, emulate=block.emulate)
    for name in quantize_linears(model, block.target_modules, make):
        m, n = whole_shape(model.get_parameter(f"{name}.weight"))
        if not block.emulate and (m % MULTIPLE or n % MULTIPLE):
            raise ValueError(
                f"target_modules: expected layers whose outputs and inputs are multiples of {MULTIPLE} for fp8, got"
                f" {name} with {m} and {n}"
            )


def quantize_trial(config: Config, model: nn.Module) -> None:
    """As :func:`quantize` does with the block that a configuration has, if any, on a model without storage.

    Raises:
        ConfigError: its globs name no layer.
    """
    if (block := config.parsed.quantization) is not None:
        with config.blames("quantization"):
            quantize(model, block)


def quantization_record(model: nn.Module, config: Config) -> dict[str, Any] | None:
    """What a run's model computes with, for its records and its export; None without the block."""
    block = config.parsed.quantization
    if block is None:
        return None
    # Also of those that have become compact.
    layers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    own = {"scale": block.scale} if block.method == "bitnet" else {"recipe": block.recipe, "emulate": block.emulate}
    return {"method": block.method, **own, "layers": layers}


def describe(model: nn.Module, config: Config) -> str | None:
    """How much of a run's model it is, for people; None without the block."""
    record = quantization_record(model, config)
    if record is None:
        return None
    linears = sum(is_target(module) or isinstance(module, nn.Linear) for module in model.modules())
    how = (
        f"ternary weights, scaled by the {record['scale']} of their magnitudes, and 8-bit inputs"
        if record["method"] == "bitnet"
        else f"FP8, {record['recipe']} scales{', emulated' if record['emulate'] else ''}"
    )
    return f"quantization: {len(record['layers'])} of {linears} linear layers compute with {how}"
