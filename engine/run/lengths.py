"""Steps of shorter and more sequences: the lengths of ``training.length_schedule``."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config.config import Config
from ..data.loader import Samples
from ..data.packed import PackedTokens
from ..micro_batch import Batch


@dataclass(frozen=True)
class Lengths:
    """The length of each step's sequences: a function of the step alone.

    A step of shorter sequences takes the samples of its places in the order, as every other, and cuts each into pieces
    of its length: the tokens of a step, and their order over the run, are what they are without a schedule.

    Attributes:
        phases: lengths that steps take in turn, and for how many steps.
        full: of the steps after them, in tokens.
    """

    phases: tuple[tuple[tuple[int, ...], int], ...]
    full: int

    def at(self, step: int) -> int:
        """Tokens per sequence in a step, the first being 0."""
        for lengths, steps in self.phases:
            if step < steps:
                return lengths[step % len(lengths)]
            step -= steps
        return self.full

    def pieces(self, step: int) -> int:
        """Into how many sequences a sample is cut in a step, the first being 0."""
        return self.full // self.at(step)

    def cut(self, batch: Batch, step: int) -> Batch:
        """Tokens ``(sequences, full length)`` as ``(sequences * pieces, length)``."""
        # Records are refused where there are phases.
        return batch.reshape(-1, self.at(step)) if isinstance(batch, Tensor) else batch

    def describe(self) -> list[dict[str, Any]]:
        """For the run's records."""
        return [{"lengths": list(lengths), "steps": steps} for lengths, steps in self.phases]


def lengths_of(config: Config, samples: Samples, num_steps: int) -> Lengths:
    """The lengths of a run's steps; all of them full without a schedule.

    Raises:
        ConfigError: the data are records, or the phases are longer than the run.
    """
    parsed = config.parsed
    assert parsed.training is not None
    assert parsed.data is not None
    full, phases = parsed.data.sequence_length, parsed.training.length_schedule
    if phases is None:
        return Lengths((), full)
    if not isinstance(samples, PackedTokens):
        raise config.error(
            "training.length_schedule: expected texts or tokens as data.train, whose samples can be cut, got records"
        )
    if (total := sum(phase.steps for phase in phases)) > num_steps:
        raise config.error(
            f"training.length_schedule: expected at most training.steps, {num_steps}, in all phases together, got"
            f" {total}"
        )
    return Lengths(tuple((tuple(phase.lengths), phase.steps) for phase in phases), full)


def check_lengths(config: Config) -> None:
    """Refuse lengths that samples cannot be cut into.

    Raises:
        ConfigError: naming each.
    """
    parsed = config.parsed
    if parsed.training is None or parsed.data is None or parsed.training.length_schedule is None:
        return
    full, megatron, problems = parsed.data.sequence_length, getattr(parsed, "megatron", None), []
    shares = megatron.tensor_parallel if megatron is not None and megatron.sequence_parallel else 1
    for number, phase in enumerate(parsed.training.length_schedule):
        where = f"training.length_schedule.{number}.lengths"
        problems += [
            f"{where}: expected divisors of data.sequence_length, {full}, got {length}"
            for length in phase.lengths
            if full % length
        ]
        problems += [
            f"{where}: expected multiples of megatron.tensor_parallel, {shares}, with sequence_parallel, got {length}"
            for length in phase.lengths
            if length % shares
        ]
    if problems:
        raise config.error(*problems)
