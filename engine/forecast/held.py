"""What a process rank holds in the course of a step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .passes import Passes, Stretch

WEIGHTS, COMPACT, GRADIENTS, MASTERS, MOMENTS = "weights", "compact", "gradients", "masters", "moments"
SUBSPACES, BUFFERS, ACTIVATIONS = "subspaces", "buffers", "activations"
KINDS = (WEIGHTS, COMPACT, GRADIENTS, MASTERS, MOMENTS, SUBSPACES, BUFFERS, ACTIVATIONS)


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Bytes of gradients, and of what reduces them.

    Attributes:
        in_forward: what is there while a forward goes on.
        in_backward: given the elements of gradients that this backward has made so far.
        buffers: while a backward makes gradients.
        in_step: what is there when the optimizer begins, and what its step takes in passing.
    """

    in_forward: int
    in_backward: Callable[[int], int]
    buffers: int
    in_step: int


@dataclass(frozen=True)
class Moment:
    """What is held at one time, by kind."""

    when: str
    bytes: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A kind of process rank.

    Attributes:
        process_ranks: which: ``0-7``.
        what: of the model: ``layers 0-3``.
        counts: elements that it holds: ``total``, ``dense``, ``compact``, ``frozen``.
        held: bytes by kind that are there all the time.
        gradients: the others that are not activations.
        chunks: passes of a micro-batch through each piece of the model.
        schedule: ``(forward or backward, chunk)`` in order.
        offloaded: bytes that each chunk's micro-batch has on the drive, if any.
        offload_buffers: bytes for reading them ahead.
        whole_weights: bytes of the weights that a checkpoint has of this kind of rank.
        is_cut: masters and moments are cut over process ranks.
        bubble: time that a pipeline waits, relative to the computation.
    """

    process_ranks: str
    what: str
    counts: Mapping[str, int]
    held: Mapping[str, int]
    gradients: Gradients
    chunks: Sequence[Passes]
    schedule: Sequence[tuple[str, int]] = (("forward", 0), ("backward", 0))
    offloaded: Sequence[int] = ()
    offload_buffers: int = 0
    whole_weights: int
    is_cut: bool
    bubble: float = 0.0

    @property
    def peak(self) -> Moment:
        """When most is held."""
        return max(self.moments(), key=lambda moment: moment.total)

    def moments(self) -> Iterator[Moment]:
        """The times at which most may be held."""
        waiting = in_flight = 0
        for name, number in self.schedule:
            passes = self.chunks[number]
            kept = self._kept(number)
            if name == "forward":
                yield self._moment(
                    "forward", waiting + self._most_in_forward(passes, number), self.gradients.in_forward
                )
                waiting, in_flight = waiting + kept, in_flight + 1
            else:
                waiting -= kept
                yield from self._backward(passes, number, waiting)
        yield self._moment("optimizer step", 0, self.gradients.in_step, self._observed())

    def _kept(self, number: int) -> int:
        return self.chunks[number].saved - self._offloaded(number) + self._buffers(number)

    def _offloaded(self, number: int) -> int:
        return self.offloaded[number] if self.offloaded else 0

    def _buffers(self, number: int) -> int:
        return self.offload_buffers if self._offloaded(number) else 0

    def _most_in_forward(self, passes: Passes, number: int) -> int:
        kept = found = 0
        share = self._stays(number)
        for stretch in passes.stretches:
            found = max(found, round(share * kept) + stretch.forward)
            kept += stretch.saved
        return found + self._buffers(number)

    def _stays(self, number: int) -> float:
        """The share of what is kept that is in memory."""
        saved = self.chunks[number].saved
        return 1.0 - self._offloaded(number) / saved if saved else 1.0

    def _backward(self, passes: Passes, number: int, waiting: int) -> Iterator[Moment]:
        share, buffers = self._stays(number), self._buffers(number)
        kept, made, observed = passes.saved, 0, 0
        places = ["before the layers", *(f"layer {i}" for i in range(len(passes.layers)))]
        yield self._moment(
            "head and loss", waiting + round(share * kept) + buffers + passes.after.forward, self.gradients.in_forward
        )
        yield self._at(
            passes.after, "backward of head and loss", waiting + round(share * kept) + buffers, made, observed
        )
        made, observed = passes.after.gradients, passes.after.observed
        for place, stretch in zip(reversed(places), reversed([passes.before, *passes.layers]), strict=True):
            yield self._at(stretch, f"backward of {place}", waiting + round(share * kept) + buffers, made, observed)
            kept -= stretch.saved
            made, observed = made + stretch.gradients, observed + stretch.observed

    def _at(self, stretch: Stretch, when: str, kept: int, made: int, observed: int) -> Moment:
        gradients = self.gradients.in_backward(made)
        return self._moment(when, kept + stretch.backward, gradients, observed + self.gradients.buffers)

    def _observed(self) -> int:
        return sum(stretch.observed for passes in self.chunks for stretch in passes.stretches)

    def _moment(self, when: str, activations: int, gradients: int, buffers: int = 0) -> Moment:
        found = {kind: self.held.get(kind, 0) for kind in KINDS}
        found[GRADIENTS] += gradients
        found[ACTIVATIONS] += activations
        found[BUFFERS] += buffers
        return Moment(when, found)
