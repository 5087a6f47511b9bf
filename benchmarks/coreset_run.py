"""One training run of a coreset benchmark's row, and its result as a file."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import stored
from benchmarks.compare import machine
from benchmarks.coreset_data import Sizes, write_sources
from benchmarks.saved import Saved
from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.config.config import Batches, Config, load_config
from narrowgauge.engine.config.coreset_block import CoresetBlock
from narrowgauge.engine.config.rate_blocks import ScheduleBlock
from narrowgauge.engine.config.run_blocks import DataBlock
from narrowgauge.engine.coreset.budgets import budgets
from narrowgauge.engine.coreset.coreset import Coreset
from narrowgauge.engine.coreset.vectors import Vectors
from narrowgauge.engine.data.examples import PreparedExamples, prepare_examples
from narrowgauge.engine.data.mixture import Mixture
from narrowgauge.engine.data.tokenizer import train_tokenizer
from narrowgauge.engine.micro_batch import MicroBatch
from narrowgauge.engine.protocol import TrainingEngine
from narrowgauge.engine.ranks.environment import ensure_environment
from narrowgauge.engine.run.model import model_config
from narrowgauge.engine.run.schedule import rule_of
from narrowgauge.optimizers.numerics.seeds import derive_seed

_FORMAT = 1
_VOCABULARY = 1024
RARE = ("aliases", "errors", "types", "statuses")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all rows share.

    Attributes:
        batch: examples that a step trains; a coreset looks at twice as many.
        steps: of every row but those that train twice as much in one.
    """

    hidden: int = 96
    layers: int = 3
    heads: int = 4
    batch: int = 32
    steps: int = 100
    warmup_steps: int = 10
    lr: float = 3e-3
    sizes: Sizes = field(default_factory=Sizes)


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        block: of the configuration; None where the batch is what the order gives.
        kind: what chooses.
        batches: batches that a step trains at once.
        share: of the steps.
    """

    block: dict[str, Any] | None = None
    kind: type[Coreset] = Coreset
    batches: int = 1
    share: float = 1.0


class OneScalar(Coreset):
    """What one direction that never changes leaves of an example: its slope, compared as a number."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert self._vectors is not None
        self._vectors = _Slopes(self._vectors.first, self._vectors.second, self._vectors.betas)

    def _directions(self, step: int) -> Tensor | None:
        return super()._directions(0)


class _Slopes(Vectors):
    def places(self, slopes: Tensor, directions: Tensor, num_coordinates: int) -> Tensor:
        return slopes


class SmallSourcesWhole(Coreset):
    """CoLM's budgets alone: all examples of small sources, and of the others any."""

    def choose(self, step: int) -> Any:
        size = 2 * self._batches.total
        samples = self._samples.order(np.arange((step - 1) * size, step * size), self._seed)
        sources = [self._samples.number_of_source(sample) for sample in samples.tolist()]
        draw = np.random.default_rng(derive_seed(self._seed, "any", step))
        chosen: list[int] = []
        for source, share in budgets(Counter(sources), self._whole, self._batches.total).items():
            places = [place for place, own in enumerate(sources) if own == source]
            chosen += draw.choice(places, share, replace=False).tolist()
        return samples[sorted(chosen)]


METHODS = {
    "random half": Method(),
    "colm": Method({"method": "colm"}),
    "one scalar": Method({"method": "colm", "directions": 1}, OneScalar),
    "small sources whole, random rest": Method({"method": "colm", "directions": 1}, SmallSourcesWhole),
    "hard": Method({"method": "hard", "skip_hardest": 0.05}),
    "full batch, equal tokens": Method(batches=2, share=0.5),
    "full batch, equal steps": Method(batches=2),
}


@dataclass(frozen=True)
class Run:
    """All that a result depends on."""

    method: str
    seed: int
    task: Task

    def settings(self) -> dict[str, Any]:
        """As JSON."""
        method = METHODS[self.method]
        chosen = {"block": method.block, "kind": method.kind.__name__, "batches": method.batches, "share": method.share}
        return {"format": _FORMAT, "method": self.method, **chosen, "seed": self.seed, "task": asdict(self.task)}

    def path(self, folder: Path) -> Path:
        """Where the result is, or will be."""
        return stored.result_path(
            folder, f"{self.method.replace(' ', '-').replace(',', '')}-{self.seed}", self.settings()
        )


def read_result(run: Run, folder: Path) -> dict[str, Any] | None:
    return stored.read_result(run.path(folder))


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Train once and write the result; nothing is left of a run that does not end."""
    result = {"settings": run.settings(), **_train(run, folder / "data"), "machine": machine()}
    stored.write_result(run.path(folder), result)
    return result


def _train(run: Run, folder: Path) -> dict[str, Any]:
    task, method = run.task, METHODS[run.method]
    steps = round(task.steps * method.share)
    samples, held = _data(task, folder)
    config = _config(task, method, run.seed)
    engine = _engine(config, steps, task.warmup_steps)
    batches = config.batches(1)
    chooser = _chooser(method, engine, samples, batches, run.seed)
    seconds: dict[str, list[float]] = {"choice": [], "step": []}
    tokens, kept = 0, Counter[str]()
    for step in range(1, steps + 1):
        begin = time.process_time()
        chosen = chooser(step)
        middle = time.process_time()
        engine.train_step(_micro_batches(samples, chosen, batches), lambda name: nullcontext())
        seconds["choice"].append(middle - begin)
        seconds["step"].append(time.process_time() - begin)
        tokens += int(samples.tokens(chosen).sum())
        kept.update(samples.source_of(sample)[0].name for sample in chosen.tolist())
    engine.close()
    losses = {name: _loss(engine, mixture) for name, mixture in held.items()}
    rare = [losses[name] for name in RARE]
    return {
        "losses": losses,
        "loss": float(np.mean([*losses.values()])),
        "rare": float(np.mean(rare)),
        "tokens": tokens,
        "kept": {name: count / kept.total() for name, count in kept.items()},
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
    }


def _data(task: Task, folder: Path) -> tuple[Mixture, dict[str, Mixture]]:
    """To train on, and of each source to validate with."""
    train_files, held_files = write_sources(folder, task.sizes)
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        texts = [json.loads(line) for path in train_files.values() for line in path.read_text().splitlines()]
        lines = [record["prompt"] + record["completion"] + "\n" for record in texts]
        train_tokenizer(lambda: iter(lines), _VOCABULARY, tokenizer)

    def prepared(train: dict[str, Path], held: dict[str, Path]) -> PreparedExamples:
        block = {
            "train": [{"path": str(path), "name": name} for name, path in train.items()],
            "validation": [{"path": str(path), "name": name} for name, path in held.items()],
            "tokenizer": str(tokenizer),
            "sequence_length": 64,
            "cache_dir": str(folder / "cache"),
        }
        return prepare_examples(DataBlock.model_validate(block))

    each = {name: prepared({name: path}, {name: held_files[name]}) for name, path in train_files.items()}
    return prepared(train_files, held_files).train, {name: one.validation for name, one in each.items()}


def _config(task: Task, method: Method, seed: int) -> Config:
    shape = {
        "model_type": "llama",
        "hidden_size": task.hidden,
        "intermediate_size": 2 * task.hidden,
        "num_hidden_layers": task.layers,
        "num_attention_heads": task.heads,
        "max_position_embeddings": 64,
        "vocab_size": _VOCABULARY,
    }
    size = method.batches * task.batch
    return load_config(
        {
            "engine": "ddp",
            "model": {"config": shape},
            "data": {"train": ["-"], "sequence_length": 64},
            "training": {"steps": task.steps, "seed": seed},
            "logging": {"run_dir": "-"},
            "train_batch_size": size,
            "train_micro_batch_size_per_gpu": size,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": task.lr, "weight_decay": 0.01, "betas": [0.9, 0.99]}},
        }
    )


def _engine(config: Config, steps: int, warmup_steps: int) -> TrainingEngine:
    backend, shape = backend_of("ddp"), config.parsed.model
    assert shape is not None
    ensure_environment()
    backend.init_distributed()
    model = backend.construct(shape, model_config(shape, vocab_size=None, sequence_length=64), config)
    block = ScheduleBlock(type="cosine", warmup_steps=warmup_steps, decay_steps=None, min_lr_ratio=0.05)
    return backend.build(config, model, schedule=partial(LambdaLR, lr_lambda=rule_of(block, steps)))


def _chooser(
    method: Method, engine: TrainingEngine, samples: Mixture, batches: Batches, seed: int
) -> Callable[[int], Any]:
    """The samples of a step, counted from 1."""
    if method.block is not None:
        block = CoresetBlock.model_validate(method.block)
        return method.kind(block, engine, samples, batches, seed=seed).choose

    def next_ones(step: int) -> Any:
        return samples.order(np.arange((step - 1) * batches.total, step * batches.total), seed)

    return next_ones


def _micro_batches(samples: Mixture, chosen: Any, batches: Batches) -> Iterator[MicroBatch]:
    for part in chosen.reshape(batches.accumulation_steps, -1):
        yield samples.micro_batch(part.tolist())


def _loss(engine: TrainingEngine, mixture: Mixture) -> float:
    batch = mixture.micro_batch(list(range(len(mixture))))
    return float(engine.evaluate(batch))


def saved_bytes(method: str, task: Task, folder: Path, *, steps: int = 2) -> float:
    """What the forwards of a step keep for backward, without the weights: the mean of the first steps."""
    samples, _ = _data(task, folder / "data")
    config = _config(task, METHODS[method], 0)
    engine, batches = _engine(config, task.steps, task.warmup_steps), config.batches(1)
    chooser = _chooser(METHODS[method], engine, samples, batches, 0)
    found = []
    for step in range(1, steps + 1):
        count = Saved(engine.module)
        with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda tensor: tensor):
            chosen = chooser(step)
            assert not count.storages
            engine.train_step(_micro_batches(samples, chosen, batches), lambda name: nullcontext())
        found.append(count.nbytes)
    engine.close()
    return float(np.mean(found))
