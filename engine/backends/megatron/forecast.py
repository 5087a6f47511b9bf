"""What process ranks hold and send under Megatron: one of each stage of the pipeline, in a group of its own."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from narrowgauge.optimizers import ShardedOptimizer
from narrowgauge.optimizers.compact.backend import LocalBackend

from ...config.config import Batches, Config
from ...config.optimizer_params import make_optimizer
from ...errors import UserError, first_line
from ...forecast.held import COMPACT, GRADIENTS, MASTERS, MOMENTS, SUBSPACES, WEIGHTS, Gradients, Rank
from ...forecast.passes import Passes, shorten, trace, without_contents
from ...forecast.sent import Sent
from ...forecast.subject import Subject, groups_of, on_meta, sharded_moments
from ...forecast.whole_model import offloaded_of
from ..deepspeed import forecast as zero
from . import cpu
from .balance import needs_counts_ahead
from .compact.tree import ModelTree, compact_units_of
from .even_experts import even_shares
from .globs import options_of_stage
from .groups import destroy_groups
from .keys import layout_of, megatron_block
from .micro_batches import Given, positions_at
from .model import StagedModel
from .passes import schedule_of
from .rehearse import build_abstract, group_of, what_of
from .zero.mpu import seen_in_parts

_FP32 = 4


def ranks_of(
    config: Config, model_config: PretrainedConfig, world_size: int, *, on_gpu: bool, steps: int
) -> Iterator[tuple[Rank, Sent]]:
    """A rank of each stage, with what it sends.

    Raises:
        ConfigError: the optimizer's options do not fit the model.
        UserError: its passes cannot be told ahead.
    """
    layout = layout_of(config, world_size)
    if config.zero_stage == 3:
        _check_stage_3(config)
    cpu.install()
    size = layout.tensor * layout.replicas
    for stage in range(layout.pipeline):
        first = stage * size
        with group_of(first, world_size):
            try:
                name = f"{first}-{first + size - 1}" if size > 1 else str(first)
                yield _Stage(config, build_abstract(config, model_config, world_size, even=True), on_gpu).told(
                    name, steps
                )
            finally:
                destroy_groups()


def _check_stage_3(config: Config) -> None:
    """
    Raises:
        ConfigError: more is held or sent at stage 3 than is told.
    """
    if config.optimizer_options is not None:
        assert config.parsed.optimizer is not None
        raise config.error(
            "zero_optimization.stage: what the megatron engine takes at stage 3 is told ahead with AdamW, got"
            f" {config.parsed.optimizer.type}"
        )
    if (recompute := megatron_block(config).recompute) != "none":
        raise config.error(
            f"megatron.recompute: expected 'none' at stage 3 to be told ahead, got {recompute!r}: it gathers parameters"
            " once more"
        )


class _Stage:
    """A process rank's part of a model, on the meta device."""

    # Bytes of moments for each element that is stepped here: their share of the stage's.
    _moments: float

    def __init__(self, config: Config, model: StagedModel, on_gpu: bool) -> None:
        self._config, self._model, self._on_gpu = config, model, on_gpu
        self._block, self._scatter_factor = megatron_block(config), 1.0 if on_gpu else 2.0
        self._tree, self._own, self._moments = ModelTree(model), None, 2.0 * _FP32
        options, block = config.optimizer_options, config.parsed.optimizer
        assert block is not None
        if options is not None:
            with config.blames("optimizer.params"):
                options = options_of_stage(options, model.architecture, model.layout, model.place)
                self._own = make_optimizer(block.type, self._tree, on_meta(options), LocalBackend())
            if isinstance(self._own, ShardedOptimizer):
                whole = sum(p.numel() for group in self._own.param_groups for p in group["params"])
                self._moments = sharded_moments(self._own) / max(1, whole)
            self._tree.hand_over(self._own)
        # Each step begins with forwards that find out what its balance loss is over.
        accumulation_steps = config.batches(model.layout.data).accumulation_steps
        self._counts_ahead = needs_counts_ahead(model.routers.values(), accumulation_steps)
        self._units = list(compact_units_of(self._own)) if self._own is not None else []

    def told(self, process_ranks: str, steps: int) -> tuple[Rank, Sent]:
        model, config = self._model, self._config
        if model.architecture.num_experts and self._block.expert_dispatcher != "alltoall":
            raise config.error(
                "megatron.expert_dispatcher: expected 'alltoall' to be told ahead, got"
                f" {self._block.expert_dispatcher!r}: routers decide on its shapes"
            )
        layout, element = model.layout, model.transformer.params_dtype.itemsize
        compact = {id(unit.compact) for unit in self._units}
        counts: dict[str, int] = dict.fromkeys(("total", "dense", "compact", "frozen"), 0)
        shares = reduced = gathered = 0.0
        trained_by: Counter[bool] = Counter()
        rings = self._scatter_factor
        for parameter in model.parameters():
            numel, is_compact = parameter.numel(), id(parameter) in compact
            counts["compact" if is_compact else "dense" if parameter.requires_grad else "frozen"] += numel
            counts["total"] += 0 if is_compact else numel
            if not parameter.requires_grad:
                continue
            is_expert = not getattr(parameter, "allreduce", True)
            copies = layout.expert_data if is_expert else layout.replicas
            trained_by[is_expert] += numel
            share = (copies - 1) / copies
            if self._block.distributed_optimizer:
                shares += -(-numel // copies)
                reduced, gathered = reduced + rings * share * _FP32 * numel, gathered + share * element * numel
            else:
                shares, reduced = shares + numel, reduced + 2 * share * _FP32 * numel
        batches, trained = config.batches(layout.data), trained_by.total()
        largest = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
        held = {
            WEIGHTS: element * (counts["dense"] + counts["frozen"]),
            COMPACT: element * counts["compact"],
            GRADIENTS: round(_FP32 * trained),
            MASTERS: round(_FP32 * shares) if config.bf16 else 0,
            MOMENTS: round(self._moments * shares),
            SUBSPACES: self._own.subspace_bytes() if self._own is not None else 0,
        }
        summed_once = self._summed_once()
        subject = self._subject(counts) if config.zero_stage else None
        # These leave a few of the layers.
        passes = [self._passes(number, batches.micro) for number in range(layout.chunks)]
        if self._counts_ahead:
            passes = [found.with_another_forward() for found in passes]
        moved = [offloaded_of(config, found) for found in passes]
        schedule = schedule_of(layout, model.place, batches.accumulation_steps)
        step = 2 * _FP32 * min(largest, round(shares))
        if self._block.distributed_optimizer and not self._on_gpu:
            # gloo scatters from, and gathers into, memory of its own; what is of experts goes by itself.
            step = max(step, _FP32 * max(trained_by.values(), default=0))
        rank = Rank(
            process_ranks=process_ranks,
            what=what_of(model),
            counts=counts,
            held=held,
            gradients=Gradients(in_forward=0, in_backward=lambda made: 0, buffers=0, in_step=step),
            chunks=passes,
            schedule=[(name, micro_batch.chunk) for name, micro_batch in schedule.passes],
            offloaded=[found for found, _ in moved] if any(found for found, _ in moved) else [],
            offload_buffers=max(buffers for _, buffers in moved),
            whole_weights=layout.tensor * held[WEIGHTS],
            is_cut=self._block.distributed_optimizer,
            bubble=(layout.pipeline - 1) / (batches.accumulation_steps * layout.chunks),
        )
        stages = self._to_stages(batches)
        activations = batches.accumulation_steps * sum(found.sent for found in passes) + summed_once + stages
        if subject is not None:
            return self._under_zero(rank, subject, moved[0], steps, activations)
        return rank, Sent(reduced=reduced, gathered=gathered, activations=activations, stages=stages)

    def _subject(self, counts: dict[str, int]) -> Subject:
        """The process rank's part of the model, as DeepSpeed is given it."""
        (chunk,) = self._model.chunks
        element = self._model.transformer.params_dtype.itemsize
        numels = [parameter.numel() for parameter in chunk.parameters()]
        return Subject(chunk, self._own, element, counts, groups_of(chunk, self._own), numels)

    def _under_zero(
        self, rank: Rank, subject: Subject, moved: tuple[int, int], steps: int, activations: float
    ) -> tuple[Rank, Sent]:
        """A rank whose part of the model DeepSpeed cuts over those that share the data."""
        config, size = zero.with_defaults(self._config), self._model.layout.data
        found = zero.rank_of(config, subject, rank.chunks[0], world_size=size, on_gpu=self._on_gpu, offloaded=moved)
        told = zero.sent(config, subject, world_size=size, on_gpu=self._on_gpu, steps=steps)
        return (
            replace(rank, held=found.held, gradients=found.gradients, is_cut=True),
            replace(told, activations=activations),
        )

    def _passes(self, number: int, micro: int) -> Passes:
        model, config, place = self._model, self._config, self._model.place
        layout, transformer = model.layout, model.transformer
        assert config.parsed.data is not None
        length, chunk = config.parsed.data.sequence_length, model.chunks[number]
        found: Any = chunk
        layers = found.decoder.layers
        num_layers = shorten(layers)
        found.decoder.num_layers_per_pipeline_rank = len(layers)
        offload = config.offload()
        chunk.train()
        try:
            with even_shares(chunk), without_contents(chunk, self._units if number == 0 else [], self._tree):
                tokens = torch.zeros(micro, length, dtype=torch.long)

                def run() -> Tensor:
                    if not layout.is_first(place, number):
                        size = length // layout.length_shares
                        shape = (size, micro, transformer.hidden_size)
                        found.set_input_tensor(torch.empty(shape, dtype=transformer.params_dtype, requires_grad=True))
                    given = Given(tokens, positions=positions_at(layout, place, tokens))
                    output = found(**given.inputs())
                    return given.loss(output) if layout.is_last(place, number) else output

                return trace(
                    chunk,
                    layers,
                    run,
                    [tokens],
                    units=self._units,
                    num_layers=num_layers,
                    min_offloaded=offload.min_tensor_bytes if offload is not None else None,
                    only_layer_inputs=offload is not None and offload.granularity == "layer_inputs",
                    scatter_factor=self._scatter_factor,
                )
        except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError) as error:
            kind = type(error).__name__
            raise UserError(f"model: its passes cannot be told ahead: {kind}: {first_line(error)}") from error

    def _to_stages(self, batches: Batches) -> float:
        """Bytes per step that forwards and backwards send to the stages before and after this one."""
        model, layout, place, config = self._model, self._model.layout, self._model.place, self._config
        assert config.parsed.data is not None
        hidden = batches.micro * config.parsed.data.sequence_length * model.transformer.hidden_size
        hidden *= model.transformer.params_dtype.itemsize
        # Forward to the next chunk, and its gradient to the one before.
        ends = sum(layout.is_last(place, n) + layout.is_first(place, n) for n in range(layout.chunks))
        sent = (2 * layout.chunks - ends) * hidden / layout.length_shares
        if self._counts_ahead:
            lasts = sum(layout.is_last(place, n) for n in range(layout.chunks))
            sent += (layout.chunks - lasts) * hidden / layout.length_shares
        return batches.accumulation_steps * sent

    def _summed_once(self) -> float:
        """Bytes per step of the gradients of norms that each tensor-parallel rank has a part of, and, where the head is
        the embedding and lies on another stage, of these two.
        """
        model, layout = self._model, self._model.layout
        numel = sum(p.numel() for p in seen_in_parts(model))
        found = 2 * (layout.tensor - 1) / layout.tensor * _FP32 * numel
        if model.architecture.tied and layout.pipeline > 1:
            for held, parameter in model.local_parameters():
                if held.name.endswith(("word_embeddings.weight", "output_layer.weight")):
                    found += _FP32 * parameter.numel()
        return found
