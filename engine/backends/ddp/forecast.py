"""What process ranks hold and send under DistributedDataParallel."""

from ...config.config import Config
from ...forecast.held import COMPACT, GRADIENTS, MOMENTS, SUBSPACES, WEIGHTS, Gradients, Rank
from ...forecast.passes import Passes
from ...forecast.sent import Sent, extra_reduced
from ...forecast.subject import Subject
from ...forecast.transient import step_transient


def rank_of(
    config: Config, subject: Subject, passes: Passes, *, world_size: int, on_gpu: bool, offloaded: tuple[int, int]
) -> Rank:
    """All process ranks hold the same. With several, gradients lie in their buckets, which stay."""
    element, whole = subject.element, subject.element * subject.trained
    accumulates = config.batches(world_size).accumulation_steps > 1
    held = {
        WEIGHTS: subject.weights,
        COMPACT: subject.compact,
        MOMENTS: subject.moments(element),
        SUBSPACES: subject.subspaces,
    }
    transient = step_transient(config, subject, subject.trained if on_gpu else subject.largest, on_gpu=on_gpu)
    if world_size > 1:
        held[GRADIENTS] = whole
        gradients = Gradients(in_forward=0, in_backward=lambda made: 0, buffers=0, in_step=transient)
    else:
        gradients = Gradients(
            in_forward=whole if accumulates else 0,
            in_backward=(lambda made: whole) if accumulates else (lambda made: element * made),
            buffers=0,
            in_step=whole + transient,
        )
    moved, buffers = offloaded
    return Rank(
        process_ranks=f"0-{world_size - 1}" if world_size > 1 else "0",
        what="the model",
        counts=subject.counts,
        held=held,
        gradients=gradients,
        chunks=[passes],
        offloaded=[moved] if moved else [],
        offload_buffers=buffers,
        whole_weights=subject.weights,
        is_cut=False,
    )


def sent(subject: Subject, *, world_size: int, steps: int) -> Sent:
    """All gradients are averaged once per step."""
    share = (world_size - 1) / world_size
    extra = extra_reduced(subject, steps=steps, sharded=False, world_size=world_size)
    return Sent(reduced=2 * share * subject.element * subject.trained + extra, gathered=0.0)
