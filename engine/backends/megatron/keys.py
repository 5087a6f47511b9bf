"""The configuration keys of the ``megatron`` engine."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from narrowgauge.optimizers import OPTIMIZERS

from ...config.blocks import Block, Count, Flag, StrictBlock
from ...config.config import Config
from ...config.engine_keys import EngineKeys
from ...config.optimizer_params import our_only
from ...config.problems import unknown_names
from ...config.without_deepspeed import Bf16Block, off_only, others_optimizer
from ...errors import did_you_mean
from .layout import Layout, Sizes

BalanceLoss = Literal["none", "micro_batch", "global"]
Size = Annotated[int, Field(ge=0, strict=True)]
ADAMW = frozenset({"lr", "betas", "eps", "weight_decay", "torch_adam"})


class Fp16Block(Block):
    model_config = ConfigDict(extra="allow")

    enabled: Annotated[Flag, off_only("expected false with the megatron engine, which scales no losses; use bf16")] = (
        False
    )


class ZeroBlock(Block):
    """DeepSpeed's ZeRO in the place of ``megatron.distributed_optimizer``; its keys, as far as they are used here."""

    model_config = ConfigDict(extra="allow")

    stage: Annotated[int, Field(ge=0, le=3, strict=True)] = 0
    contiguous_gradients: Flag = True
    overlap_comm: Flag | None = None
    reduce_scatter: Flag = True
    reduce_bucket_size: Count | None = None
    allgather_bucket_size: Count | None = None
    stage3_max_live_parameters: Size | None = None
    stage3_max_reuse_distance: Size | None = None
    stage3_prefetch_bucket_size: Size | None = None
    stage3_param_persistence_threshold: Size | None = None


class MegatronBlock(StrictBlock):
    """How the model is cut over the process ranks, and what Megatron does meanwhile."""

    tensor_parallel: Count = 1
    """Process ranks that share each layer's matrices."""
    pipeline_parallel: Count = 1
    """Process ranks that hold different layers."""
    virtual_pipeline: Count = 1
    """Pieces of layers on each of the latter, in turn; more than 1 is the interleaved schedule."""
    context_parallel: Count = 1
    """Process ranks that share each sequence."""
    expert_parallel: Count = 1
    """Process ranks that hold different experts."""
    expert_tensor_parallel: Count | None = None
    """Process ranks that share each expert's matrices; default ``tensor_parallel``."""
    sequence_parallel: Flag = False
    """Norms and residuals are cut along the sequence over the ``tensor_parallel`` ranks."""
    recompute: Literal["none", "full", "selective"] = "none"
    """What backward computes again: nothing, whole layers, or ``recompute_modules``."""
    recompute_layers: Count = 1
    """Of ``full``: layers between two kept activations."""
    recompute_modules: list[Literal["core_attn", "mlp", "layernorm", "moe"]] = ["core_attn"]
    """Of ``selective``."""
    distributed_optimizer: Flag = True
    """Masters and moments are cut over the data-parallel ranks, as ZeRO-1 does."""
    overlap_grad_reduce: Flag = False
    """Gradients are reduced while backward goes on."""
    overlap_param_gather: Flag = False
    """Parameters are gathered while the next forward goes on; needs the other two."""
    balance_loss: BalanceLoss = "none"
    """Weighted by the model's ``router_aux_loss_coef``: none, over each micro-batch of each data-parallel rank, or over
    the whole batch of a step. The last counts ahead in a forward of its own where a step has several micro-batches."""
    expert_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens come to their experts' process ranks: each to its own, or all to all."""
    expert_capacity_factor: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None = None
    """Tokens that an expert takes of a micro-batch on a process rank, over those of an even share; further ones are
    dropped, the least weighted first. None drops none."""
    transformer_engine: Flag = True
    """Norms and attention are Transformer Engine's, on GPUs where it is installed."""
    grouped_experts: Flag = False
    """All experts of a layer in one grouped product; needs Transformer Engine and a GPU."""
    fp8: Flag = False
    """Refused: it needs linear layers of Transformer Engine's."""

    def sizes(self) -> Sizes:
        return Sizes(
            tensor=self.tensor_parallel,
            pipeline=self.pipeline_parallel,
            chunks=self.virtual_pipeline,
            context=self.context_parallel,
            expert=self.expert_parallel,
            expert_tensor=self.expert_tensor_parallel or self.tensor_parallel,
            sequence_parallel=self.sequence_parallel,
        )


class MegatronKeys(EngineKeys):
    """What the engine takes beside narrowgauge's blocks."""

    megatron: MegatronBlock = MegatronBlock()
    bf16: Bf16Block | None = None
    fp16: Fp16Block | None = None
    zero_optimization: ZeroBlock | None = None
    scheduler: Annotated[Any, off_only("the megatron engine has none; use training.lr_schedule")] = None
    steps_per_print: int | float | None = None
    """Of DeepSpeed's own log, which this engine does not write."""

    @classmethod
    def problems_in(cls, raw: Mapping[str, Any]) -> list[str]:
        found = others_optimizer(raw)
        if found is None:
            return []
        name, keys = found
        if name.lower() not in ("adam", "adamw"):
            known = sorted({*OPTIMIZERS, "AdamW"})
            return [f"optimizer.type: expected one of {known}, got {name!r}{did_you_mean(name, known)}"]
        own = [key for key in keys if key not in our_only() or key in ADAMW]
        return unknown_names("optimizer.params", name, own, ADAMW)


def megatron_block(config: Config) -> MegatronBlock:
    """The block of a configuration that was read for this engine."""
    assert isinstance(config.parsed, MegatronKeys)
    return config.parsed.megatron


def layout_of(config: Config, world_size: int) -> Layout:
    """How a configuration cuts the model over a number of process ranks.

    Raises:
        ConfigError: it does not fit that number.
    """
    try:
        return Layout.of(megatron_block(config).sizes(), world_size)
    except ValueError as error:
        raise config.error(f"megatron.{error}") from error
