"""Options of LAMB and LARS."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ..options import GLOBS, SWITCH, AdamOptions, Check, Epsilon, LearningRate, Options, WeightDecay, is_number, number


def _is_pair_of_bounds(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
    return numbers and 0.0 <= value[0] <= value[1] and value[1] > 0.0


@dataclass(frozen=True, kw_only=True)
class LambOptions(AdamOptions):
    """Options of :class:`~.lamb.Lamb`."""

    eps: Epsilon = 1e-6
    weight_norm_bounds: Annotated[
        Sequence[float] | None,
        Check("[low, high] with 0 <= low <= high and high above 0", _is_pair_of_bounds),
        "``(low, high)`` of ``phi(z) = min(max(z, low), high)``; None for ``phi(z) = z``",
    ] = None
    exclude: Annotated[
        Sequence[str] | None,
        GLOBS,
        "globs over names of parameters that get plain Adam without decay or trust ratio; default those of fewer than"
        " two dimensions (norms and biases), ``[]`` for none",
    ] = None


@dataclass(frozen=True, kw_only=True)
class LarsOptions(Options):
    """Options of :class:`~.lars.Lars`. ``lr`` is the paper's gamma; it multiplies the tensors' own rates."""

    group_options: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")

    lr: LearningRate
    momentum: Annotated[float, number(at_least=0.0, below=1.0), "in [0, 1)"] = 0.9
    trust_coefficient: Annotated[float, number(above=0.0), "the paper's eta"] = 1e-3
    weight_decay: WeightDecay = 0.0
    nesterov: Annotated[bool, SWITCH, "step by ``update + momentum * v`` instead of ``v``"] = False
    exclude: Annotated[
        Sequence[str] | None,
        GLOBS,
        "globs over names of parameters that get plain momentum SGD without decay or trust ratio; default those of"
        " fewer than two dimensions (norms and biases), ``[]`` for none",
    ] = None

    def _conflicts(self) -> Iterator[str]:
        yield from super()._conflicts()
        if self.nesterov and self.momentum == 0.0:
            yield "nesterov: expected a momentum above 0, got 0"
