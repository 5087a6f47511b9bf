"""What process ranks hold and send under ZeRO; after DeepSpeed 0.19's sources, stage by stage."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from narrowgauge.optimizers import CompactOptimizer

from ...config.config import Config
from ...forecast.held import BUFFERS, COMPACT, GRADIENTS, MASTERS, MOMENTS, SUBSPACES, WEIGHTS, Gradients, Rank
from ...forecast.passes import Passes
from ...forecast.sent import Sent, extra_reduced, num_refreshes
from ...forecast.subject import FP32, Subject
from ...forecast.transient import step_transient

_FP64 = 8
# The most elements that are flattened at once without ZeRO.
_PLAIN_BUCKET = 500_000_000


def with_defaults(config: Config) -> Config:
    """A configuration of the megatron engine, with DeepSpeed's defaults of ``zero_optimization``."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # not where Megatron has no ZeRO

    block = DeepSpeedZeroConfig(**config.raw["zero_optimization"])
    return replace(config, parsed=config.parsed.model_copy(update={"zero_optimization": block}))


def rank_of(
    config: Config, subject: Subject, passes: Passes, *, world_size: int, on_gpu: bool, offloaded: tuple[int, int]
) -> Rank:
    """What each process rank holds: they are all alike, but for how parameters fall on the borders of shards."""
    if config.zero_stage == 3:
        held, gradients = _stage_3(config, subject, world_size, on_gpu)
    elif config.zero_stage:
        held, gradients = _stage_1_or_2(config, subject, world_size, on_gpu)
    else:
        held, gradients = _stage_0(config, subject, world_size, on_gpu)
    moved, buffers = offloaded
    return Rank(
        process_ranks=f"0-{world_size - 1}" if world_size > 1 else "0",
        what="the model" if config.zero_stage < 3 else "a part of each parameter",
        counts=subject.counts,
        held={**held, SUBSPACES: subject.subspaces},
        gradients=gradients,
        chunks=[passes],
        offloaded=[moved] if moved else [],
        offload_buffers=buffers,
        whole_weights=subject.weights,
        is_cut=config.zero_stage > 0,
    )


def _stage_0(config: Config, subject: Subject, world_size: int, on_gpu: bool) -> tuple[dict[str, int], Gradients]:
    element, accumulates = subject.element, _accumulates(config, world_size)
    whole = element * subject.trained
    flattened = element * min(_PLAIN_BUCKET, subject.trained)
    held = {WEIGHTS: subject.weights, COMPACT: subject.compact, MOMENTS: subject.moments(element)}
    step = max(flattened, step_transient(config, subject, subject.largest, on_gpu=on_gpu))
    return held, Gradients(
        in_forward=whole if accumulates else 0,
        in_backward=(lambda made: whole) if accumulates else (lambda made: element * made),
        buffers=0,
        in_step=whole + step,
    )


def _stage_1_or_2(config: Config, subject: Subject, world_size: int, on_gpu: bool) -> tuple[dict[str, int], Gradients]:
    zero: Any = config.parsed.zero_optimization
    element, accumulates, is_stage_2 = subject.element, _accumulates(config, world_size), config.zero_stage == 2
    sizes = [_padded(sum(group), world_size) for group in subject.groups]
    shard, largest_shard = sum(sizes) // world_size, max(sizes) // world_size
    held = {
        WEIGHTS: subject.weights + element * (sum(sizes) - subject.trained),
        COMPACT: subject.compact,
        MASTERS: FP32 * shard,
        MOMENTS: subject.moments(FP32) // world_size,
    }
    own = element * max(_touching(subject.groups, sizes, world_size, rank) for rank in range(world_size))
    whole, bucket = element * subject.trained, element * int(zero.reduce_bucket_size)
    buckets = bucket * (2 if zero.overlap_comm else 1)
    flattened = min(bucket, whole) if zero.reduce_scatter else 0
    step = max(
        _FP64 * subject.largest,
        element * largest_shard * (element < FP32)
        + FP32 * largest_shard
        + step_transient(config, subject, largest_shard, on_gpu=on_gpu),
    )
    offload = zero.offload_optimizer
    if offload is not None and offload.device != "none":
        # Masters, moments and their gradients are the host's.
        host = element * shard + FP32 * shard + element * subject.largest
        held |= {MASTERS: 0, MOMENTS: 0, BUFFERS: element * subject.largest} if on_gpu else {BUFFERS: host}
        step = 0 if on_gpu else step - FP32 * largest_shard
    if is_stage_2:
        return held, Gradients(
            in_forward=own if accumulates else 0,
            # Those of a rank's parts are kept as they are made, beside the sums of the micro-batches before.
            in_backward=lambda made: min(own, element * made) + (own if accumulates else 0),
            buffers=buckets + flattened,
            in_step=own + step,
        )
    # What is in the bucket is a gradient's new place.
    reducing = whole - min(bucket, whole) + buckets + flattened + own
    return held, Gradients(
        in_forward=whole if accumulates else 0,
        in_backward=(lambda made: whole) if accumulates else (lambda made: element * made),
        buffers=buckets,
        in_step=max(own + step, reducing),
    )


def _stage_3(config: Config, subject: Subject, world_size: int, on_gpu: bool) -> tuple[dict[str, int], Gradients]:
    zero: Any = config.parsed.zero_optimization
    element, shapes = subject.element, subject.numels
    parts = sum(-(-numel // world_size) for numel in shapes)
    persistent = sum(numel for numel in shapes if numel <= zero.param_persistence_threshold)
    total = sum(shapes)
    reused = total <= zero.max_reuse_distance
    live = total - persistent if reused else min(total - persistent, zero.max_live_parameters)
    trained = sum(-(-numel // world_size) for group in subject.groups for numel in group)
    whole, bucket = element * subject.trained, element * int(zero.reduce_bucket_size)
    held = {
        WEIGHTS: element * (parts + persistent) - subject.compact // world_size,
        COMPACT: subject.compact // world_size,
        GRADIENTS: element * trained,
        MASTERS: FP32 * trained if element < FP32 else 0,
        MOMENTS: subject.moments(FP32) // world_size,
        BUFFERS: bucket + element * live,
    }
    group = min(int(zero.sub_group_size) // world_size, max(sum(group) for group in subject.groups) // world_size)
    step = (element + (FP32 if element < FP32 else 0)) * group
    step += step_transient(config, subject, group, on_gpu=on_gpu)
    offload = zero.offload_optimizer
    if offload is not None and offload.device != "none" and on_gpu:
        held |= {MASTERS: 0, MOMENTS: 0}
        step = 0
    return held, Gradients(
        in_forward=0,
        in_backward=lambda made: element * subject.largest,
        buffers=min(bucket, whole),
        # The gathered parameters are let go before it.
        in_step=max(0, step - element * live),
    )


def _accumulates(config: Config, world_size: int) -> bool:
    return config.batches(world_size).accumulation_steps > 1


def _padded(numel: int, world_size: int) -> int:
    """A group's flat parameters are cut into equal parts, each of an even number of elements."""
    return 2 * world_size * math.ceil(numel / (2 * world_size))


def _touching(groups: Sequence[Sequence[int]], sizes: Sequence[int], world_size: int, rank: int) -> int:
    """Elements of the parameters of which a rank's parts hold something."""
    found = 0
    for group, size in zip(groups, sizes, strict=True):
        first, end, start = rank * (size // world_size), (rank + 1) * (size // world_size), 0
        for numel in group:
            if start < end and start + numel > first:
                found += numel
            start += numel
    return found


def sent(config: Config, subject: Subject, *, world_size: int, on_gpu: bool, steps: int) -> Sent:
    """See :class:`~narrowgauge.engine.forecast.sent.Sent`; ring algorithms, as what a run counts."""
    zero: Any = config.parsed.zero_optimization
    share, stage, element = (world_size - 1) / world_size, config.zero_stage, subject.element
    micro_batches = config.batches(world_size).accumulation_steps
    # Of DeepSpeed's own keys.
    told = getattr(config.parsed, "communication_data_type", None)
    reduced_as = element if told is None else (FP32 if told == "fp32" else 2)
    extra = extra_reduced(subject, steps=steps, sharded=stage > 0, world_size=world_size)
    optimizer, refreshes = subject.optimizer, 0.0
    exchanged = _exchanged(subject, stage, world_size)
    if isinstance(optimizer, CompactOptimizer):
        refreshes = num_refreshes(optimizer, steps, first=False) / steps
    if stage < 3:
        times = micro_batches if stage == 2 else 1
        gathered = element * sum(_padded(sum(group), world_size) for group in subject.groups) if stage else 0
        if stage and element < FP32 and optimizer is not None and optimizer.type_name == "Grass":
            # Rounded masters at a change of subspace.
            gathered += refreshes * subject.compact
        return Sent(
            reduced=2 * times * share * reduced_as * subject.trained + extra, gathered=share * gathered + exchanged
        )
    rings, threshold = 1 if on_gpu else 2, zero.param_persistence_threshold
    persistent = sum(numel for numel in subject.numels if numel <= threshold)
    # Once a step, and once more in the two steps that DeepSpeed takes to learn the order; the others in forward and in
    # backward.
    gathered = persistent * (1 + min(2, steps) / steps) + 2 * micro_batches * (sum(subject.numels) - persistent)
    reduced = rings * micro_batches * share * reduced_as * subject.trained
    if isinstance(optimizer, CompactOptimizer):
        pairs = [p.numel() for layer in optimizer.layers for p in (layer.module.weight, layer.module.compact)]
        gathered += refreshes * (subject.counts["compact"] + sum(numel for numel in pairs if numel <= threshold))
        extra += 2 * share * refreshes * subject.compact
    gathered *= share * element
    return Sent(reduced=reduced + extra, gathered=gathered + exchanged)


def _exchanged(subject: Subject, stage: int, world_size: int) -> float:
    """Bytes per step that a rank sends of matrices that Muon puts together, the mean over the ranks."""
    if subject.muon is None or stage == 0:
        return 0.0
    names, moved = {id(p): name for name, p in subject.model.named_parameters()}, 0
    for group in (group["params"] for group in subject.muon.param_groups if group["kind"] != "dense"):
        position, shard = 0, _padded(sum(p.numel() for p in group), world_size) // world_size
        for parameter in group:
            spec = subject.muon.matrices[names[id(parameter)]]
            # At stage 3 every parameter is cut by itself.
            start, width = (0, -(-parameter.numel() // world_size)) if stage == 3 else (position, shard)
            for first in range(start, start + spec.count * spec.size, spec.size):
                last = first + spec.size
                most = max(
                    min(last, (n + 1) * width) - max(first, n * width) for n in range(first // width, -(-last // width))
                )
                # To the rank with the most of it, and back.
                moved += 2 * (spec.size - most)
            position += parameter.numel()
    return FP32 * moved / world_size
