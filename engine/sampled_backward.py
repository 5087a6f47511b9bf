"""The ``sampled_backward`` block carried out on a model, before an optimizer is made of it."""

from functools import partial
from typing import Any

from torch import nn

from narrowgauge.optimizers.layers.compact import CompactLinear
from narrowgauge.optimizers.layers.registry import is_target
from narrowgauge.optimizers.layers.sampled_linear import SampledLinear, sample_linears
from narrowgauge.optimizers.layers.sampling import Rad, WtaCrs

from .config.config import Config
from .config.sampling_block import SampledBackwardBlock

# What reads the input of a layer with an adapter; the frozen layer keeps nothing of it.
_FACTORS = ["*.lora_A.*"]


def check_sampling(config: Config) -> None:
    """Refuse what sampled layers cannot go with, before anything is built.

    Raises:
        ConfigError: naming each setting.
    """
    parsed = config.parsed
    if parsed.sampled_backward is None:
        return
    problems = []
    if parsed.engine == "megatron":
        problems.append(
            "sampled_backward: expected engine 'deepspeed' or 'ddp', got 'megatron', whose layers keep their inputs"
            " themselves"
        )
    if parsed.quantization is not None:
        problems.append("sampled_backward: expected no quantization beside it, got one: a layer does one of the two")
    if problems:
        raise config.error(*problems)


def sample_backward(model: nn.Module, block: SampledBackwardBlock, *, lora: bool) -> None:
    """Let the model's layers keep what the block says.

    Raises:
        ValueError: its globs name no layer.
    """
    make = partial(WtaCrs, block.keep, block.min_rows) if block.method == "wta_crs" else partial(Rad, block.keep)
    targets = block.target_modules
    sample_linears(model, _FACTORS if targets is None and lora else targets, make)


def sample_trial(config: Config, model: nn.Module) -> None:
    """As :func:`sample_backward` does with the block that a configuration has, if any, on a model without storage.

    Raises:
        ConfigError: its globs name no layer.
    """
    if (block := config.parsed.sampled_backward) is not None:
        with config.blames("sampled_backward"):
            sample_backward(model, block, lora=config.parsed.lora is not None)


def sampling_record(model: nn.Module, config: Config) -> dict[str, Any] | None:
    """What a run's layers keep, for its records; None without the block."""
    block = config.parsed.sampled_backward
    if block is None:
        return None
    own = {"min_rows": block.min_rows} if block.method == "wta_crs" else {}
    layers = [name for name, module in model.named_modules() if _samples(module)]
    return {"method": block.method, "keep": block.keep, **own, "layers": layers}


def describe(model: nn.Module, config: Config) -> str | None:
    """How much of a run's model it is, for people; None without the block."""
    record = sampling_record(model, config)
    if record is None:
        return None
    linears = sum(is_target(module) or isinstance(module, nn.Linear) for module in model.modules())
    kept = "of the tokens" if record["method"] == "wta_crs" else "of the features, projected at random,"
    return (
        f"sampled backward: {len(record['layers'])} of {linears} linear layers keep {record['keep']:.0%} {kept} for"
        " their weights' gradients, which are right in the mean"
    )


def _samples(module: nn.Module) -> bool:
    # Also where it has become compact.
    return isinstance(module, SampledLinear) or (isinstance(module, CompactLinear) and module.sampled is not None)
