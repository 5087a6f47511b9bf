"""The part of each large batch that a run trains."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from narrowgauge.optimizers.numerics.seeds import derive_seed

from ..config.config import Batches, Config
from ..config.coreset_block import CoresetBlock
from ..data.mixture import Mixture
from ..errors import UserError
from ..micro_batch import MicroBatch
from ..protocol import TrainingEngine
from .budgets import budgets, small_sources
from .facility import choose
from .slopes import example_losses, slopes
from .vectors import Vectors, distances, draw_directions

NO_RECORDS = "coreset: expected records as data.train, whose examples can be chosen, got texts or tokens"

Numbers = npt.NDArray[np.int64]


def check_coreset(config: Config, batches: Batches) -> None:
    """Refuse what a coreset cannot go with, before anything is built.

    Raises:
        ConfigError: naming each setting and what to use instead.
    """
    block, parsed = config.parsed.coreset, config.parsed
    if block is None:
        return
    problems = []
    if parsed.engine == "megatron":
        problems.append("coreset: expected engine 'deepspeed' or 'ddp', got 'megatron'")
    if parsed.data is not None and parsed.data.train == "stdlib":
        problems.append(NO_RECORDS)
    if parsed.data is not None and parsed.data.packing:
        problems.append("coreset: expected data.packing false, as each example is chosen by itself, got true")
    if _rounds(block, batches) is None:
        problems.append(
            f"coreset.keep: expected the gradient accumulation's {batches.accumulation_steps} steps divided by it to be"
            f" a whole number, got {block.keep}"
        )
    if problems:
        raise config.error(*problems)


def large_batch(block: CoresetBlock | None, batches: Batches) -> int:
    """Samples that a step goes through, of which ``batches.total`` are trained."""
    rounds = _rounds(block, batches) if block is not None else batches.accumulation_steps
    assert rounds is not None
    return batches.total // batches.accumulation_steps * rounds


def _rounds(block: CoresetBlock, batches: Batches) -> int | None:
    """How many micro-batches each rank looks at in a step."""
    exact = batches.accumulation_steps / block.keep
    return round(exact) if abs(exact - round(exact)) < 1e-9 else None


class Coreset:
    """Chooses the samples of each step and gives their micro-batches.

    Each micro-batch of the large batch is looked at by one rank, in evaluation mode and without gradients, and is the
    same whatever the number of ranks; what was found is gathered, and all ranks take the choice that the first makes.

    Attributes:
        kept: of the last step, how many examples of each source were trained, by name.
        tokens: of the last step, in all that was trained.
    """

    def __init__(
        self,
        block: CoresetBlock,
        engine: TrainingEngine,
        samples: Mixture,
        batches: Batches,
        *,
        seed: int,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            beat: called before each micro-batch that is looked at.

        Raises:
            UserError: the model has no such layer, or the data no such source.
        """
        self._block, self._engine, self._samples, self._batches, self._seed = block, engine, samples, batches, seed
        self.kept: dict[str, int] = {}
        self.tokens, self._beat = 0, beat
        self._whole = self._whole_sources()
        self._layer, self._vectors = "", None
        if block.method == "colm":
            self._layer, self._shape = _layer_of(engine, block.module)
            zeros = torch.zeros(self._shape[0] * self._shape[1], device=engine.device)
            self._vectors = Vectors(zeros, zeros.clone(), block.betas)

    def _whole_sources(self) -> set[int]:
        names = [source.name for source in self._samples.sources]
        wanted = self._block.whole_sources
        if wanted is None:
            return small_sources([len(source) for source in self._samples.sources])
        if odd := [name for name in wanted if name not in names]:
            raise UserError(f"coreset.whole_sources: expected names of data.train's sources {names}, got {odd[0]!r}")
        return {names.index(name) for name in wanted}

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a step, counted from 1. Collective."""
        chosen = self.choose(step)
        ranks, shape = self._engine.data_parallel, self._batches
        parts = chosen.reshape(shape.accumulation_steps, ranks.size, shape.micro)
        learned = self._samples.learned(chosen).reshape(parts.shape).sum(axis=2)
        weights = learned * (learned.size / learned.sum())
        for number in range(shape.accumulation_steps):
            yield self._samples.micro_batch(parts[number, ranks.rank].tolist(), float(weights[number, ranks.rank]))

    def choose(self, step: int) -> Numbers:
        """The samples that a step trains, in the order of the large batch. Collective."""
        size, micro = large_batch(self._block, self._batches), self._batches.micro
        samples = self._samples.order(np.arange((step - 1) * size, step * size), self._seed)
        directions = self._directions(step)
        model: nn.Module = self._engine.module
        was_training = model.training
        model.eval()
        try:
            own = [self._look_at(group.tolist(), directions) for group in self._groups(samples.reshape(-1, micro))]
        finally:
            model.train(was_training)
        found = self._gathered(torch.stack(own))
        places = self._agreed(self._choice(samples, found, directions))
        if self._vectors is not None and directions is not None:
            self._vectors.update(found[places], directions)
        chosen = samples[places]
        names = [source.name for source in self._samples.sources]
        counts = Counter(self._samples.number_of_source(sample) for sample in chosen.tolist())
        self.tokens = int(self._samples.tokens(chosen).sum())
        self.kept = {name: counts[number] for number, name in enumerate(names)}
        return chosen

    def _groups(self, groups: Numbers) -> Numbers:
        ranks = self._engine.data_parallel
        return groups[ranks.rank :: ranks.size]

    def _directions(self, step: int) -> Tensor | None:
        if self._vectors is None:
            return None
        seeds = [derive_seed(self._seed, "coreset", step, number) for number in range(self._block.directions)]
        return draw_directions(seeds, self._vectors.first.numel(), self._engine.device)

    def _look_at(self, group: list[int], directions: Tensor | None) -> Tensor:
        """Slopes of the examples ``(micro-batch, D)``, or their losses ``(micro-batch, 1)``."""
        self._beat()
        engine = self._engine
        batch = self._samples.micro_batch(group).to(engine.device)
        if directions is None:
            return example_losses(engine.module, batch).double()[:, None]
        return slopes(
            engine.module,
            self._layer,
            batch,
            directions.view(-1, *self._shape),
            self._block.epsilon,
            whole_forwards=engine.forward_is_collective,
        )

    def _gathered(self, own: Tensor) -> Tensor:
        """Of all ranks, in the order of the large batch: ``(examples, D)``."""
        ranks = self._engine.data_parallel
        parts = [torch.empty_like(own) for _ in range(ranks.size)]
        dist.all_gather(parts, own.contiguous(), group=ranks.group)
        return torch.stack(parts, dim=1).flatten(0, 2)

    def _choice(self, samples: Numbers, found: Tensor, directions: Tensor | None) -> list[int]:
        """Places in the large batch."""
        if not bool(torch.isfinite(found).all()):
            bad = int((~torch.isfinite(found)).any(1).sum())
            raise UserError(
                f"coreset: expected finite losses, got {bad} of {len(found)} examples that have none"
            ).shared()
        budget = self._batches.total
        if directions is None or self._vectors is None:
            hardest = torch.argsort(found[:, 0], descending=True, stable=True).tolist()
            return hardest[int(self._block.skip_hardest * len(hardest)) :][:budget]
        sources = [self._samples.number_of_source(sample) for sample in samples.tolist()]
        shares = budgets(Counter(sources), self._whole, budget)
        chosen: list[int] = []
        for source, share in sorted(shares.items()):
            places = [place for place, own in enumerate(sources) if own == source]
            if 0 < share < len(places):
                stand = self._vectors.places(found[places], directions, self._block.coordinates)
                places = [places[number] for number in choose(distances(stand), share)]
            chosen += places[:share]
        return chosen

    def _agreed(self, places: list[int]) -> list[int]:
        """The first rank's, in order: ranks on different machines may round differently."""
        group = self._engine.data_parallel.group
        agreed = torch.tensor(sorted(places), device=self._engine.device)
        dist.broadcast(agreed, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
        return agreed.tolist()

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint; None where there is nothing to keep."""
        return self._vectors.state() if self._vectors is not None else None

    def load(self, state: dict[str, Any] | None) -> None:
        """
        Raises:
            UserError: the state is of another layer, or of another method.
        """
        if self._vectors is None:
            return
        if state is None or state["first"].shape != self._vectors.first.shape:
            raise UserError("coreset: the checkpoint was written without it, or with another layer").shared()
        self._vectors.load(state)


def _layer_of(engine: TrainingEngine, wanted: str | None) -> tuple[str, tuple[int, int]]:
    """The layer's name and the shape of its weight."""
    layers = {
        name: (module.out_features, module.in_features)
        for name, module in engine.module.named_modules()
        if isinstance(module, nn.Linear)
    }
    if wanted is not None:
        if wanted not in layers:
            raise UserError(f"coreset.module: expected the name of a linear layer, got {wanted!r}: {_some(layers)}")
        return wanted, layers[wanted]
    found = [name for name in layers if name.endswith(("v_proj", "v_proj.base_layer"))]
    if not found:
        raise UserError(f"coreset.module: expected one, as the model has no v_proj: {_some(layers)}")
    name = found[-1]
    adapter = f"{name.removesuffix('.base_layer')}.lora_B.default"
    name = adapter if adapter in layers else name
    return name, layers[name]


def _some(layers: dict[str, tuple[int, int]]) -> str:
    return f"it has {', '.join(list(layers)[-4:])}"
