"""Whether a layout fits a model: in numbers, with the nearest layouts that do."""

from collections.abc import Iterator
from itertools import product

from .architecture import Architecture
from .layout import Layout, Sizes

_NUM_NEAREST = 3


def problems_of_layout(
    architecture: Architecture, layout: Layout, *, sequence_length: int | None, accumulation_steps: int
) -> list[str]:
    """What keeps a model from being cut so, ``key: expected ..., got ...`` each; the last also names near layouts."""
    problems = list(_problems(architecture, layout, sequence_length, accumulation_steps))
    if problems:
        near = nearest_layouts(architecture, layout, sequence_length, accumulation_steps)
        names = ", ".join(f"{found.describe()}" for found in near) or "none"
        problems[-1] += f"; nearest that fit {layout.world_size} process ranks: {names}"
    return problems


def _problems(
    model: Architecture, layout: Layout, sequence_length: int | None, accumulation_steps: int
) -> Iterator[str]:
    tensor, stages = layout.tensor, layout.pipeline * layout.chunks
    for count, what in ((model.heads, "attention heads"), (model.kv_heads, "key and value heads")):
        if count % tensor:
            yield f"tensor_parallel: expected a divisor of the model's {count} {what}, got {tensor}"
    if not model.num_experts and model.width % tensor:
        yield f"tensor_parallel: expected a divisor of the model's intermediate_size {model.width}, got {tensor}"
    if model.shared_width % tensor:
        yield f"tensor_parallel: expected a divisor of the shared expert's width {model.shared_width}, got {tensor}"
    if model.num_layers % stages:
        yield (
            f"pipeline_parallel: expected pipeline_parallel ({layout.pipeline}) x virtual_pipeline ({layout.chunks}) to"
            f" divide the model's {model.num_layers} layers, got {stages}"
        )
    if layout.chunks > 1 and accumulation_steps % layout.pipeline:
        yield (
            "virtual_pipeline: expected gradient_accumulation_steps to be a multiple of pipeline_parallel"
            f" ({layout.pipeline}) with it, got {accumulation_steps}"
        )
    if layout.context > 1 and sequence_length is not None and sequence_length % layout.length_divisor:
        shared = f", which tensor_parallel ({tensor}) shares too" if layout.sequence_parallel else ""
        yield (
            f"context_parallel: expected data.sequence_length to be a multiple of {layout.length_divisor}, as each of"
            f" {layout.context} ranks has two pieces of it{shared}, got {sequence_length}"
        )
    elif layout.sequence_parallel and sequence_length is not None and sequence_length % tensor:
        yield (
            f"sequence_parallel: expected tensor_parallel ({tensor}) to divide data.sequence_length, got"
            f" {sequence_length}"
        )
    yield from _problems_of_experts(model, layout)


def _problems_of_experts(model: Architecture, layout: Layout) -> Iterator[str]:
    if not model.num_experts:
        if layout.expert > 1:
            yield f"expert_parallel: expected 1 for a model without experts, got {layout.expert}"
        elif layout.expert_tensor != layout.tensor:
            yield "expert_tensor_parallel: expected none for a model without experts"
        return
    if model.num_experts % layout.expert:
        yield f"expert_parallel: expected a divisor of the model's {model.num_experts} experts, got {layout.expert}"
    if model.expert_width % layout.expert_tensor:
        yield (
            f"expert_tensor_parallel: expected a divisor of the experts' width {model.expert_width}, got"
            f" {layout.expert_tensor}"
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        yield (
            "sequence_parallel: expected true for a model with experts at tensor_parallel > 1, got false: Megatron"
            " would route every token on each of these ranks"
        )


def nearest_layouts(
    architecture: Architecture, layout: Layout, sequence_length: int | None, accumulation_steps: int
) -> list[Layout]:
    """The layouts on as many process ranks, nearest to one that does not fit, nearest first."""
    divisors = [size for size in range(1, layout.world_size + 1) if layout.world_size % size == 0]
    experts = divisors if architecture.num_experts else [1]
    contexts = divisors if layout.context > 1 else [1]
    found = []
    for tensor, context, pipeline, expert in product(divisors, contexts, divisors, experts):
        for expert_tensor in sorted({tensor, 1}) if architecture.num_experts else [tensor]:
            sizes = Sizes(
                tensor=tensor,
                pipeline=pipeline,
                chunks=layout.chunks if pipeline > 1 else 1,
                context=context,
                expert=expert,
                expert_tensor=expert_tensor,
                sequence_parallel=tensor > 1 and (layout.sequence_parallel or architecture.num_experts > 0),
            )
            found += _fitting(architecture, layout, sizes, sequence_length, accumulation_steps)
    return sorted(found, key=lambda other: _distance(layout, other))[:_NUM_NEAREST]


def _fitting(
    architecture: Architecture, layout: Layout, sizes: Sizes, sequence_length: int | None, accumulation_steps: int
) -> list[Layout]:
    try:
        candidate = Layout.of(sizes, layout.world_size)
    except ValueError:
        return []
    # The number of micro-batches changes with the data-parallel size; as it is given, it may be another's.
    steps = max(1, accumulation_steps * candidate.data // layout.data) if candidate.chunks > 1 else accumulation_steps
    return [] if any(_problems(architecture, candidate, sequence_length, steps)) else [candidate]


def _distance(layout: Layout, other: Layout) -> float:
    pairs = (
        (layout.tensor, other.tensor),
        (layout.context, other.context),
        (layout.pipeline, other.pipeline),
        (layout.expert, other.expert),
        (layout.expert_tensor, other.expert_tensor),
    )
    return sum(max(a, b) / min(a, b) - 1 for a, b in pairs)
