"""Training tiny models by an engine on the ranks of a pool, for tests that compare layouts."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from narrowgauge.engine.config.config import Config, load_config
from narrowgauge.engine.protocol import TrainingEngine
from tests.support.megatron_models import hf_config, model_block

NUM_SEQUENCES, MICRO_BATCH, LENGTH, VOCAB = 8, 2, 16, 101


def run_config(engine: str, family: str, layout: dict[str, Any] | None = None, **more: Any) -> Config:
    """Two sequences in a micro-batch, eight in a step, on any number of ranks; the model from scratch."""
    return load_config(
        {
            "engine": engine,
            "train_batch_size": NUM_SEQUENCES,
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_clipping": 0.2,
            # With the usual epsilon Adam makes whole steps of rounding noise: a key's bias has no other gradient.
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}},
            "model": {"config": model_block(family)},
            "data": {"sequence_length": LENGTH},
            "training": {"steps": 1, "seed": 3},
            **({"megatron": layout} if layout is not None else {}),
            **more,
        }
    )


def make_engine(config: Config, family: str, **changes: Any) -> TrainingEngine:
    """The engine as ``narrowgauge train`` makes it.

    Args:
        changes: of the model's configuration.
    """
    backend = backend_of(config.parsed.engine)
    described = hf_config(family, **changes)
    backend.check(config)
    backend.check_model(config, described, dist.get_world_size())
    assert config.parsed.model is not None
    model = backend.construct(config.parsed.model, described, config)
    return backend.build(config, model, schedule=lambda opt: LambdaLR(opt, lambda step: min(1.0, (step + 1) / 3)))


def tokens_of(step: int, size: int = NUM_SEQUENCES) -> Tensor:
    return torch.randint(VOCAB, (size, LENGTH), generator=torch.Generator().manual_seed(step))


def micro_batches(engine: TrainingEngine, step: int) -> Iterator[Tensor]:
    """This rank's of the step's eight sequences, in the order in which one process takes them."""
    own, ranks = tokens_of(step).chunk(NUM_SEQUENCES // MICRO_BATCH), engine.data_parallel
    return (own[number * ranks.size + ranks.rank] for number in range(engine.accumulation_steps))


def train(engine: TrainingEngine, first: int, last: int) -> list[tuple[float, float]]:
    """The mean losses over all ranks, and the norms of the gradients."""
    found = []
    for step in range(first, last):
        loss = engine.train_step(micro_batches(engine, step), lambda name: nullcontext())
        dist.all_reduce(loss)
        norm = engine.grad_norm()
        assert norm is not None
        found.append((float(loss) / dist.get_world_size() / engine.accumulation_steps, norm))
    return found


def weights_of(engine: TrainingEngine) -> dict[str, Tensor]:
    """The whole weights on rank 0."""
    engine.before_save()
    return {name: tensor.detach().clone() for name, tensor in engine.whole_weights()}


Run = tuple[list[tuple[float, float]], float, dict[str, Tensor]]


def run_steps(
    engine_name: str,
    family: str,
    layout: dict[str, Any] | None = None,
    *,
    last: int = 4,
    load: str | None = None,
    save: tuple[int, str] | None = None,
    **more: Any,
) -> Run:
    """Losses and norms of each step, the loss on other data after the last, and the weights.

    Args:
        load: a checkpoint to go on from, in an engine that has trained on something else.
        save: after which step, and where.
    """
    engine = make_engine(run_config(engine_name, family, layout, **more), family)
    first = 0
    if load is not None:
        train(engine, 99, 100)
        load_checkpoint(engine, Path(load))
        first = engine.counters()["global_steps"]
    found = []
    for step in range(first, last):
        found += train(engine, step, step + 1)
        if save is not None and step + 1 == save[0]:
            save_checkpoint(engine, Path(save[1]), {"note": 1})
    evaluated = float(engine.evaluate(tokens_of(1000, MICRO_BATCH)))
    weights = weights_of(engine)
    engine.close()
    return found, evaluated, weights
