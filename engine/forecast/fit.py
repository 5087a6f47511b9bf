"""The settings with which a run fits a machine: the fastest, or the one that trains most of the model at a time."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PretrainedConfig

from ..backends import backend_of
from ..config.config import Config, load_config
from ..errors import UserError
from .forecast import Forecast, forecast
from .hardware import GIB, GPUS
from .machine import Machine
from .whole_model import Traces

Objective = Literal["fastest", "largest"]

_STAGES, _DENSITIES = (1, 2, 3), (0.5, 0.25, 0.125, 0.0625)
_WITH_DENSITY = ("Grass", "GaLore", "Frugal")
# Times as many machines that are tried where nothing fits.
_MORE = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Choice:
    """What is searched for; None leaves what the configuration says.

    Attributes:
        offload: what the drives take: ``none``, ``layer_inputs`` or ``saved_tensors``.
    """

    stage: int | None
    density: float | None
    recomputes: bool | None
    offload: str | None
    micro: int

    def described(self) -> str:
        parts = [
            f"ZeRO-{self.stage}" if self.stage is not None else "",
            f"density {self.density:g}" if self.density is not None else "",
            f"micro-batches of {self.micro}",
            "layers recomputed" if self.recomputes else "",
            f"{self.offload} on the drives" if self.offload not in (None, "none") else "",
        ]
        return ", ".join(part for part in parts if part)

    def applied(self, raw: dict[str, Any], total: int) -> dict[str, Any]:
        """A configuration with it.

        Args:
            total: sequences per step.
        """
        found = copy.deepcopy(raw)
        if self.stage is not None:
            found.setdefault("zero_optimization", {})["stage"] = self.stage
        if self.density is not None:
            found["optimizer"]["params"]["density"] = self.density
        if self.recomputes is not None and found.get("engine") == "megatron":
            found.setdefault("megatron", {})["recompute"] = "full" if self.recomputes else "none"
        elif self.recomputes is not None:
            found["model"]["gradient_checkpointing"] = "non-reentrant" if self.recomputes else "none"
        if self.offload is not None:
            block = found["activation_offload"]
            block["enabled"] = self.offload != "none"
            if self.offload != "none":
                block["granularity"] = self.offload
        found.pop("gradient_accumulation_steps", None)
        found |= {"train_batch_size": total, "train_micro_batch_size_per_gpu": self.micro}
        return found


@dataclass(frozen=True)
class Found:
    """A choice, the configuration with it, and its forecast."""

    choice: Choice
    raw: dict[str, Any]
    forecast: Forecast


class Search:
    """Forecasts of one configuration under different choices."""

    def __init__(
        self, config: Config, model_config: PretrainedConfig, machine: Machine, traces: Traces | None = None
    ) -> None:
        self._config, self._model_config, self._machine = config, model_config, machine
        self._traces = traces or Traces(of_many=True)
        data_parallel = backend_of(config.parsed.engine).data_parallel_size(config, machine.world_size)
        self._total = config.batches(data_parallel).total
        self._per_rank = self._total // data_parallel

    def choices(self) -> Iterator[Choice]:
        """All but the micro-batches, of which each has the smallest."""
        parsed, params = self._config.parsed, self._config.raw.get("optimizer", {}).get("params", {})
        assert parsed.optimizer is not None
        densities: Sequence[float | None] = (None,)
        if parsed.optimizer.type in _WITH_DENSITY and "rank" not in params:
            densities = sorted({*_DENSITIES, params.get("density", _DENSITIES[1])}, reverse=True)
        is_deepspeed = parsed.engine == "deepspeed"
        stages: Sequence[int | None] = _STAGES if is_deepspeed else (None,)
        offloads = ("none", "layer_inputs", "saved_tensors") if parsed.activation_offload is not None else (None,)
        block = self._config.raw.get("megatron", {})
        # What was chosen in detail stays.
        is_chosen = block.get("recompute") == "selective" or "recompute_layers" in block
        recomputes: Sequence[bool | None] = (None,) if is_chosen else (False, True)
        for stage, density, offload, recompute in itertools.product(stages, densities, offloads, recomputes):
            # Layers whose inputs are offloaded recompute anyway.
            if not (offload == "layer_inputs" and recompute):
                yield Choice(stage, density, recompute, offload, 1)

    def micro_batches(self) -> list[int]:
        """Those that make whole steps, ascending."""
        return [micro for micro in range(1, self._per_rank + 1) if self._per_rank % micro == 0]

    def tell(self, choice: Choice, machine: Machine | None = None) -> Found | None:
        """The forecast of a choice; None where the engine refuses it.

        Args:
            machine: another one.
        """
        machine = machine or self._machine
        raw = choice.applied(self._config.raw, self._total)
        try:
            config = load_config(raw)
            backend_of(config.parsed.engine).check(config)
            found = forecast(
                replace(config, source=self._config.source),
                self._model_config,
                world_size=machine.world_size,
                machine=machine,
                traces=self._traces,
            )
        except UserError as error:
            self.refusal = error
            return None
        return Found(choice, raw, found)

    def largest_micro_batch(self, choice: Choice) -> tuple[Found | None, Found | None]:
        """The choice with the largest micro-batch that fits, and that with the smallest.

        Memory grows with the micro-batch, and larger ones are never slower: fewer of them reduce and gather.
        """
        sizes = self.micro_batches()
        smallest = self.tell(choice)
        if smallest is None or not smallest.forecast.fits:
            return None, smallest
        best, low, high = smallest, 0, len(sizes) - 1
        while low < high:
            middle = (low + high + 1) // 2
            found = self.tell(replace(choice, micro=sizes[middle]))
            if found is not None and found.forecast.fits:
                best, low = found, middle
            else:
                high = middle - 1
        return best, smallest


def order(objective: Objective) -> Callable[[Found], tuple[float, ...]]:
    """What the best has most of."""

    def key(found: Found) -> tuple[float, ...]:
        assert found.forecast.seconds is not None
        speed = -found.forecast.seconds.step
        density, stage = found.choice.density or 0.0, -(found.choice.stage or 0)
        simple = stage, -int(bool(found.choice.recomputes)), -int(found.choice.offload not in (None, "none"))
        return (density, speed, *simple) if objective == "largest" else (speed, density, *simple)

    return key


def fit(
    config: Config,
    model_config: PretrainedConfig,
    machine: Machine,
    objective: Objective,
    *,
    traces: Traces | None = None,
) -> Found:
    """The best choice that fits.

    Args:
        traces: of other forecasts of the same model, to go on from.
        objective: ``fastest``: most tokens per second; ``largest``: the largest density, and of those the fastest.

    Raises:
        UserError: nothing fits: names the closest, and what it would fit.
    """
    search = Search(config, model_config, machine, traces)
    fitting: list[Found] = []
    smallest: list[Found] = []
    for choice in search.choices():
        best, least = search.largest_micro_batch(choice)
        fitting += [best] if best is not None else []
        smallest += [least] if least is not None else []
    if fitting:
        return max(fitting, key=order(objective))
    if not smallest:
        raise search.refusal
    closest = min(smallest, key=lambda found: found.forecast.peak.total)
    raise UserError(f"{config.source}: {_nothing_fits(search, closest, machine)}")


def _nothing_fits(search: Search, closest: Found, machine: Machine) -> str:
    needed = closest.forecast.peak.total
    cures = [name for name, gpu in sorted(GPUS.items(), key=lambda item: item[1].memory) if gpu.usable >= needed][:1]
    for times in _MORE:
        more = replace(machine, nodes=machine.nodes * times)
        found = search.tell(closest.choice, more)
        if found is not None and found.forecast.fits:
            cures.append(f"{more.nodes} nodes")
            break
    return (
        f"nothing fits {machine.described()}, {machine.gpu.usable / GIB:.1f} GiB each: the closest,"
        f" {closest.choice.described()}, takes {needed / GIB:.1f} ({closest.forecast.peak.when}); it fits "
        + (" or ".join(cures) if cures else "none of the GPUs known here: take a smaller model or shorter sequences")
    )
