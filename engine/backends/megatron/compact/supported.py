"""What our optimizers cannot do under Megatron; refused before anything starts. Nothing of Megatron's is imported."""

from collections.abc import Iterator

from narrowgauge.optimizers import OPTIMIZERS, CompactOptimizer
from narrowgauge.optimizers.apollo.options import ApolloOptions
from narrowgauge.optimizers.frugal.options import FrugalOptions
from narrowgauge.optimizers.galore.options import GaLoreOptions
from narrowgauge.optimizers.grass.options import GrassOptions

from ....config.config import Config
from ..architecture import Architecture
from ..keys import megatron_block
from ..layout import Layout


def unsupported(config: Config) -> Iterator[str]:
    """What of the configured optimizer does not work, ``key: why`` each."""
    optimizer, options = config.parsed.optimizer, config.optimizer_options
    assert optimizer is not None
    assert options is not None
    cls, sizes = OPTIMIZERS[optimizer.type].class_for(options), megatron_block(config).sizes()
    if config.zero_stage and not issubclass(cls, CompactOptimizer):
        yield (
            f"optimizer.type: expected Grass, GaLore or AdamW with the megatron engine at zero_optimization.stage"
            f" {config.zero_stage}, got {optimizer.type}, which needs the ranks that hold the other pieces of a weight,"
            " over which DeepSpeed does not cut it; use megatron.distributed_optimizer"
        )
        return
    if megatron_block(config).grouped_experts and issubclass(cls, CompactOptimizer):
        yield (
            f"megatron.grouped_experts: expected false with {optimizer.type}, got true: Transformer Engine's grouped"
            " products make gradients of whole matrices; experts with compact parameters run one after the other"
        )
    problems = list(cls.unsupported_in_engine(options, sharded=True))
    if (base := getattr(options, "base", "AdamW")) in ("AdamW8bit", "Muon", "NorMuon"):
        why = (
            "it is not supported yet" if base == "AdamW8bit" else "ranks have slices of matrices, which it needs whole"
        )
        problems.append(f"base: expected 'AdamW' with the megatron engine, got {base!r}: {why}")
    if isinstance(options, GrassOptions):
        problems += _grass(
            options, tensor=sizes.tensor, has_stages=sizes.pipeline > 1, under_zero=config.zero_stage > 0
        )
    elif isinstance(options, FrugalOptions):
        problems += _frugal(options, shares=max(sizes.tensor, sizes.expert_tensor), has_stages=sizes.pipeline > 1)
    elif isinstance(options, ApolloOptions) and options.reference_compatible:
        problems.append(
            "reference_compatible: expected false with the megatron engine, got true: a matrix's seed is its number"
            " among all parameters, which no process rank has"
        )
    yield from (f"optimizer.params.{problem}" for problem in problems)


def _frugal(options: FrugalOptions, *, shares: int, has_stages: bool) -> Iterator[str]:
    for key in ("embeddings", "head"):
        if (found := getattr(options, key)) != "full":
            yield (
                f"{key}: expected 'full' with the megatron engine, got {found!r}: the vocabulary is cut over process"
                " ranks"
            )
    if options.selection == "randk" and shares > 1:
        yield (
            f"selection: expected one of lines or projections with matrices that {shares} process ranks share, got"
            " 'randk': a rank would hash the positions of all ranks"
        )
    if options.selection == "blockwise" and has_stages:
        yield (
            "selection: expected another than 'blockwise' with megatron.pipeline_parallel, which chooses among all"
            " matrices: no process rank sees all layers"
        )


def _grass(options: GrassOptions, *, tensor: int, has_stages: bool, under_zero: bool) -> Iterator[str]:
    if options.strata % tensor:
        yield (
            f"strata: expected a multiple of megatron.tensor_parallel, {tensor}, got {options.strata}: each of the"
            " ranks that share a matrix trains as many of its columns or rows"
        )
    if options.vocabulary != "dense":
        yield (
            f"vocabulary: expected 'dense' with the megatron engine, got {options.vocabulary!r}: the vocabulary is cut"
            " over process ranks"
        )
    if options.moments != "reset" and under_zero:
        yield (
            f"moments: expected 'reset' with the megatron engine and zero_optimization, got {options.moments!r}:"
            " they are in DeepSpeed's flat pieces; use megatron.distributed_optimizer"
        )
    if options.budget is not None and has_stages:
        yield (
            f"budget: expected None with megatron.pipeline_parallel, got {options.budget}: no process rank sees all"
            " layers"
        )
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


def unsupported_model(config: Config, architecture: Architecture, layout: Layout) -> Iterator[str]:
    """What of the configured optimizer does not work with the model's experts in a layout."""
    options, shares = config.optimizer_options, layout.expert_tensor
    if not architecture.num_experts or shares == 1:
        return
    if isinstance(options, GrassOptions):
        # Gate and up lie below each other in the model, and one after the other in each shard.
        pieces = shares if options.side == "columns" else 2 * shares
        if options.strata % pieces:
            yield (
                f"optimizer.params.strata: expected a multiple of {pieces}, into which expert_tensor_parallel"
                f" ({shares}) cuts the {options.side} of experts' matrices, got {options.strata}"
            )
    elif isinstance(options, GaLoreOptions):
        hidden, width = architecture.hidden, architecture.expert_width
        projects_outputs = options.side in ("left", "full") or (options.side == "std" and 2 * width < hidden)
        projects_inputs = options.side in ("right", "full") or (options.side == "std" and hidden >= width)
        for is_projected, what in (
            (projects_outputs, "gate_up_proj's outputs"),
            (projects_inputs, "down_proj's inputs"),
        ):
            if is_projected:
                yield (
                    f"optimizer.params.side: expected one that leaves experts' {what} whole with"
                    f" expert_tensor_parallel {shares}, which cuts them, got {options.side!r} at {2 * width} x {hidden}"
                    f" and {hidden} x {width}; expert_tensor_parallel 1 cuts nothing"
                )
