"""What our optimizers cannot do under Megatron; refused before anything starts. Nothing of Megatron's is imported."""

from collections.abc import Iterator
from typing import Any

from narrowgauge.optimizers import OPTIMIZERS, CompactOptimizer
from narrowgauge.optimizers.grass.options import GrassOptions

from ....config.config import Config
from ..architecture import Architecture
from ..keys import megatron_block


def unsupported(config: Config) -> Iterator[str]:
    """What of the configured optimizer does not work, ``key: why`` each."""
    optimizer, options = config.parsed.optimizer, config.optimizer_options
    assert optimizer is not None
    assert options is not None
    cls: Any = OPTIMIZERS[optimizer.type].class_for(options)
    if not issubclass(cls, CompactOptimizer):
        yield (
            f"optimizer.type: expected Grass, GaLore or AdamW with the megatron engine, got {optimizer.type}: it needs"
            " whole gradients of single weights, and Megatron packs several into one"
        )
        return
    sizes = megatron_block(config).sizes()
    problems = list(cls.unsupported_in_engine(options, sharded=True))
    if getattr(options, "base", "AdamW") == "AdamW8bit":
        problems.append("base: expected 'AdamW' with the megatron engine, got 'AdamW8bit': it is not supported yet")
    if isinstance(options, GrassOptions):
        problems += _grass(options, tensor=sizes.tensor, has_stages=sizes.pipeline > 1)
    yield from (f"optimizer.params.{problem}" for problem in problems)


def _grass(options: GrassOptions, *, tensor: int, has_stages: bool) -> Iterator[str]:
    if options.strata % tensor:
        yield (
            f"strata: expected a multiple of megatron.tensor_parallel, {tensor}, got {options.strata}: each of the"
            " ranks that share a matrix trains as many of its columns or rows"
        )
    refused = {
        "budget": (None, "no process rank sees all layers"),
        "vocabulary": ("dense", "the vocabulary is cut over process ranks"),
        "moments": ("reset", "not supported yet"),
    }
    for key, (expected, why) in refused.items():
        if getattr(options, key) != expected:
            yield f"{key}: expected {expected!r} with the megatron engine, got {getattr(options, key)!r}: {why}"
    if options.repeats:
        yield f"selection: expected one without repeats with the megatron engine, got {options.selection!r}"
    if options.statistics == "local":
        yield (
            "statistics: expected 'sketch' or 'exact' with the megatron engine, got 'local': no process rank has whole"
            " gradients"
        )
    if options.adaptive_refresh is not None and has_stages:
        yield (
            f"adaptive_refresh: expected None with megatron.pipeline_parallel, got {options.adaptive_refresh}: no"
            " process rank sees all layers"
        )


def unsupported_model(config: Config, architecture: Architecture) -> Iterator[str]:
    """What of the configured optimizer does not work with the model."""
    optimizer = config.parsed.optimizer
    assert optimizer is not None
    if architecture.num_experts:
        yield (
            f"optimizer.type: expected AdamW for mixtures of experts with the megatron engine, got {optimizer.type}: it"
            " is not supported yet"
        )
