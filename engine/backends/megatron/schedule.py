"""Forward and backward over the stages of a pipeline, by Megatron's schedules, and forward alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ...protocol import Phase
from .micro_batches import Given, positions_at
from .model import StagedModel
from .offload import ScheduledOffload


def forward_backward(
    chunks: Sequence[nn.Module], micro_batches: Sequence[Given], phase: Phase, offload: ScheduledOffload
) -> Tensor:
    """Forwards and backwards of all micro-batches, and the reduction of gradients. Collective.

    Args:
        chunks: wrapped by Megatron's DistributedDataParallel.
        offload: around each forward.

    Returns:
        The sum of the mean losses, float64; the same on all ranks with the same data.
    """
    first, *others = micro_batches
    assert all(other.shape == first.shape for other in others)
    turns = _Turns(phase)

    def step(batches: Iterator[tuple[int, int, Given]], chunk: nn.Module) -> tuple[Tensor, Any]:
        number, place, given = next(batches)
        with turns.forward(), offload.forward(number, place):
            return chunk(**given.inputs()), partial(_scaled, given)

    offload.begin_step()
    with turns.backward():
        losses = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[
                iter([(number, place, given) for number, given in enumerate(micro_batches)])
                for place in range(len(chunks))
            ],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            seq_length=first.shape[1],
            micro_batch_size=first.shape[0],
            forward_only=False,
        )
    total = torch.zeros((), dtype=torch.float64, device=first.tokens.device)
    for loss in losses:
        total += loss
    return whole_loss(total)


@torch.no_grad()
def forward_without_head(chunks: Sequence[nn.Module], micro_batches: Sequence[Given], phase: Phase) -> None:
    """Forwards of all micro-batches up to the head, for what the layers find out in them. Collective.

    Args:
        chunks: wrapped by Megatron's DistributedDataParallel.
    """
    wrapped: Sequence[Any] = chunks

    def step(batches: Iterator[Given], chunk: nn.Module) -> tuple[Tensor, Any]:
        return chunk(**next(batches).inputs()), lambda hidden: (hidden.new_zeros(()), hidden.new_zeros(()))

    for chunk in wrapped:
        chunk.module.leaves_out_head = True
    try:
        with phase("forward"):
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter(micro_batches) for _ in chunks],
                model=list(chunks),
                num_microbatches=len(micro_batches),
                seq_length=micro_batches[0].shape[1],
                micro_batch_size=micro_batches[0].shape[0],
                forward_only=True,
            )
    finally:
        for chunk in wrapped:
            chunk.module.leaves_out_head = False


def _scaled(given: Given, losses: Tensor) -> tuple[Tensor, Tensor]:
    loss = given.loss(losses)
    # Megatron divides the first in place.
    return loss, loss.detach().clone()


def whole_loss(tensor: Tensor) -> Tensor:
    """The last stage's values, summed over the ranks that share sequences, on all stages. Collective."""
    _sum_over_sequence(tensor)
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tensor, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return tensor


def _sum_over_sequence(tensor: Tensor) -> None:
    group: Any = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)


@torch.no_grad()
def forward(model: StagedModel, given: Given) -> Tensor:
    """The mean loss of a micro-batch; the same on all ranks with the same data. Collective."""
    losses, device = _through_the_stages(model, given.inputs()), given.tokens.device
    loss = given.loss(losses) if losses is not None else torch.zeros((), dtype=torch.float32, device=device)
    return whole_loss(loss)


@torch.no_grad()
def next_token_logits(model: StagedModel, tokens: Tensor) -> Tensor:
    """What the model says of the token after ``(batch, sequence)``, of any length: ``(batch, vocabulary)``, fp32; the
    same on all process ranks. Collective.
    """
    layout, place, (batch, length) = model.layout, model.place, tokens.shape
    # Ranks share it evenly; no position sees what is behind it.
    padded = torch.nn.functional.pad(tokens, (0, -length % layout.length_divisor))
    given = Given(padded, positions=positions_at(layout, place, padded))
    inputs = {**given.inputs(), "labels": None, "runtime_gather_output": True}
    found = _through_the_stages(model, inputs)
    vocab = model.architecture.vocab
    logits = torch.zeros(batch, vocab, dtype=torch.float32, device=tokens.device)
    if found is not None:
        own = given.positions if given.positions is not None else torch.arange(padded.shape[1], device=tokens.device)
        logits += found[:, own == length - 1, :vocab].sum(1)  # of one of the ranks that share a sequence
    _sum_over_sequence(logits)
    # The last stage's ranks are the last.
    dist.broadcast(logits, src=layout.world_size - layout.tensor * layout.replicas)
    return logits


def _through_the_stages(model: StagedModel, inputs: Mapping[str, Any]) -> Tensor | None:
    """What the last chunk says, on the last stage; each stage takes its turn. Collective.

    Megatron's interleaved schedule takes no fewer micro-batches than there are stages, so this is none of them.
    """
    layout, place, transformer, tokens = model.layout, model.place, model.transformer, inputs["input_ids"]
    # Tokens are cut over the context ranks already.
    length = tokens.shape[1] * layout.context // layout.length_shares
    shape = (length, tokens.shape[0], transformer.hidden_size)
    for number, chunk in enumerate(model.chunks):
        chunk: Any
        if not layout.is_first(place, number):
            received = torch.empty(shape, dtype=transformer.params_dtype, device=tokens.device)
            dist.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(received)
        found = chunk(**inputs)
        if layout.is_last(place, number):
            return found
        dist.send(found.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
    return None


class _Turns:
    """The phase of a schedule: backward, but where it calls a forward."""

    def __init__(self, phase: Phase) -> None:
        self._phase, self._open = phase, ExitStack()

    def _enter(self, name: str) -> None:
        self._open.close()
        self._open.enter_context(self._phase(name))

    @contextmanager
    def backward(self) -> Iterator[None]:
        with self._open:
            self._enter("backward")
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        self._enter("forward")
        yield
        self._enter("backward")
