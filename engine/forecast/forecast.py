"""A run's memory, traffic, time and cost, told from its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ..backends import backend_of
from ..config.config import Batches, Config
from .held import GRADIENTS, MASTERS, MOMENTS, SUBSPACES, Moment, Rank
from .machine import Machine
from .sent import Sent
from .whole_model import Traces

_DAY = 86400.0
# Steps of a run whose length its data decide.
_SOME_STEPS = 1000


@dataclass(frozen=True)
class Seconds:
    """Of a step."""

    products: float
    operations: float
    optimizer: float
    collectives: float
    drive: float
    bubble: float

    @property
    def step(self) -> float:
        return self.products + self.operations + self.optimizer + self.collectives + self.drive + self.bubble


@dataclass(frozen=True)
class Forecast:
    """What is told of a run.

    Attributes:
        ranks: a process rank of each kind, and what it sends per step.
        steps: of the run; None where its data decide.
        written: bytes to the drives per step and process rank.
        seconds: on the machine; None where there is none.
    """

    config: Config
    batches: Batches
    world_size: int
    ranks: Sequence[tuple[Rank, Sent]]
    steps: int | None
    tokens_per_step: int
    written: float
    machine: Machine | None
    seconds: Seconds | None

    @property
    def peak(self) -> Moment:
        """The most that a process rank holds."""
        return max((rank.peak for rank, _ in self.ranks), key=lambda moment: moment.total)

    @property
    def sent(self) -> Sent:
        """The most that a process rank sends."""
        return max((sent for _, sent in self.ranks), key=lambda sent: sent.total)

    @property
    def fits(self) -> bool:
        return self.machine is None or self.peak.total <= self.machine.gpu.usable

    @property
    def days(self) -> float | None:
        return None if self.steps is None or self.seconds is None else self.steps * self.seconds.step / _DAY

    @property
    def checkpoint(self) -> int:
        """Bytes: the weights, what is stepped in fp32, moments and subspaces, of all process ranks."""
        total = 0
        for rank, _ in self.ranks:
            masters, moments = rank.held.get(MASTERS, 0), rank.held.get(MOMENTS, 0)
            copies = self._copies(rank)
            total += rank.whole_weights + (masters + moments) * copies + rank.held.get(SUBSPACES, 0)
        return total

    def _copies(self, rank: Rank) -> int:
        return self.world_size // len(self.ranks) if rank.is_cut else 1

    def as_dict(self) -> dict[str, Any]:
        """JSON values; bytes and seconds."""
        found: dict[str, Any] = {
            "process_ranks": self.world_size,
            "sequences_per_step": self.batches.total,
            "micro_batch": self.batches.micro,
            "micro_batches": self.batches.accumulation_steps,
            "ranks": [
                {
                    "process_ranks": rank.process_ranks,
                    "holds": rank.what,
                    "parameters": dict(rank.counts),
                    "peak": {"bytes": rank.peak.total, "when": rank.peak.when, "by_kind": dict(rank.peak.bytes)},
                    "saved_activations": {kind: n for passes in rank.chunks for kind, n in passes.saved_by.items()},
                    "offloaded": sum(rank.offloaded),
                    "sent": {"reduced": sent.reduced, "gathered": sent.gathered, "activations": sent.activations},
                }
                for rank, sent in self.ranks
            ],
            "checkpoint_bytes": self.checkpoint,
            "written_per_step": self.written,
        }
        if self.machine is not None and self.seconds is not None:
            found |= {
                "machine": self.machine.described(),
                "fits": self.fits,
                "seconds": {**vars(self.seconds), "step": self.seconds.step},
                "tokens_per_second": self.tokens_per_step / self.seconds.step,
                "days": self.days,
            }
        return found


def forecast(
    config: Config,
    model_config: PretrainedConfig,
    *,
    world_size: int,
    machine: Machine | None = None,
    steps: int | None = None,
    traces: Traces | None = None,
) -> Forecast:
    """Tell a run's memory and traffic; on a machine also its time.

    Args:
        config: one that was checked for the number of process ranks.
        machine: of GPUs; without one the run is on CPUs.
        steps: of the run, where that is known.
        traces: of other forecasts of the same model, to go on from.

    Raises:
        UserError: it cannot be told ahead.
    """
    parsed = config.parsed
    assert parsed.data is not None
    backend = backend_of(parsed.engine)
    data_parallel = backend.data_parallel_size(config, world_size)
    batches = config.batches(data_parallel)
    if steps is None and parsed.training is not None:
        steps = parsed.training.steps
    told = backend.forecast(
        config,
        model_config,
        world_size,
        on_gpu=machine is not None,
        steps=steps if steps is not None else _SOME_STEPS,
        traces=traces,
    )
    seconds = None
    if machine is not None:
        told = [(_on_drive(config, rank, machine), sent) for rank, sent in told]
        seconds = max((seconds_of(config, batches, rank, sent, machine) for rank, sent in told), key=lambda s: s.step)
    written = max(sum(rank.offloaded) for rank, _ in told) * batches.accumulation_steps
    tokens = batches.total * parsed.data.sequence_length
    return Forecast(config, batches, world_size, told, steps, tokens, written, machine, seconds)


def _on_drive(config: Config, rank: Rank, machine: Machine) -> Rank:
    """A rank of which the drive has what it can take and give back while its micro-batch is computed."""
    options = config.offload()
    if options is None or options.keep_resident != "auto" or not rank.offloaded:
        return rank
    found = []
    for nbytes, passes in zip(rank.offloaded, rank.chunks, strict=True):
        compute = passes.flops / machine.products(is_bf16=config.bf16) + passes.moved / machine.operations
        found.append(min(nbytes, round(machine.disk_of_rank * compute / 2)))
    return replace(rank, offloaded=found)


def seconds_of(config: Config, batches: Batches, rank: Rank, sent: Sent, machine: Machine) -> Seconds:
    passes = [rank.chunks[number] for name, number in rank.schedule if name == "forward"]
    if len(rank.schedule) == 2:
        passes = passes * batches.accumulation_steps
    products = sum(found.flops for found in passes) / machine.products(is_bf16=config.bf16)
    operations = sum(found.moved for found in passes) / machine.operations
    # Masters and moments are read and written, gradients read.
    stepped = sum(2 * rank.held.get(kind, 0) for kind in (MASTERS, MOMENTS)) + rank.peak.bytes[GRADIENTS]
    computed = products + operations
    collectives = (sent.reduced + sent.gathered) / machine.slowest_link
    if _overlaps(config):
        collectives = max(0.0, collectives - computed / 2)
    # What is between layers is waited for.
    collectives += (sent.activations - sent.stages) / link_in_layers(config, machine)
    collectives += sent.stages / machine.slowest_link
    moved = 2 * sum(rank.offloaded) * len(passes) / max(1, len(rank.chunks))
    return Seconds(
        products=products,
        operations=operations,
        optimizer=stepped / machine.operations,
        collectives=collectives,
        drive=max(0.0, moved / machine.disk_of_rank - computed),
        bubble=computed * rank.bubble,
    )


def link_in_layers(config: Config, machine: Machine) -> float:
    """Bytes per second between the process ranks that share a layer or its experts: neighbours, in one node or not."""
    block = getattr(config.parsed, "megatron", None)
    if block is None:
        return machine.slowest_link
    sizes = block.sizes()
    return machine.link_among(max(sizes.tensor, sizes.expert * sizes.expert_tensor))


def _overlaps(config: Config) -> bool:
    """Whether collectives go on beside the computation."""
    zero, block = config.parsed.zero_optimization, getattr(config.parsed, "megatron", None)
    if config.parsed.engine == "ddp":
        return True
    return bool(block.overlap_grad_reduce if block is not None else zero is not None and zero.overlap_comm)
