"""DeepSpeed's curriculum over a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder
from torch import Tensor
from torch.utils.data import Dataset

from narrowgauge.engine import initialize
from tests.support.models import tiny
from tests.support.ranks import RankPool
from tests.support.zero import finish

_SIZE = 32


class Samples(Dataset[Tensor]):
    def __len__(self) -> int:
        return _SIZE

    def __getitem__(self, number: int) -> Tensor:
        return torch.tensor([number] * 4)


def write_index(path: Path, rows: list[list[int]]) -> None:
    builder: Any = MMapIndexedDatasetBuilder(f"{path}.bin", dtype=np.int64)
    for row in rows:
        builder.add_item(torch.tensor(row))
    builder.end_document()
    builder.finalize(f"{path}.idx")


def make_engine(folder: Path) -> tuple[Any, Any]:
    np.random.seed(0)  # DeepSpeed draws from it
    schedule = {"total_curriculum_step": 10, "difficulty_step": 1}
    metric = {
        "index_to_sample_path": str(folder / "samples"),
        "index_to_metric_path": str(folder / "metrics"),
        "difficulty_type": "value",
        "clustering_type": "single_cluster",
        "min_difficulty": 2,
        "max_difficulty": 8,
        "schedule_type": "fixed_linear",
        "schedule_config": schedule,
    }
    learning = {"enabled": True, "data_cluster_path": str(folder / "cluster"), "curriculum_metrics": {"m": metric}}
    sampling = {"enabled": True, "num_epochs": 5, "num_workers": 0, "curriculum_learning": learning}
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Grass", "params": {"lr": 1e-2, "density": 0.5}},
        "data_efficiency": {"enabled": True, "seed": 1, "data_sampling": sampling},
    }
    engine, _, loader, _ = initialize(model=tiny(blocks=1), config=config, training_data=Samples())
    return engine, loader


def batches_of(engine: Any, loader: Any, count: int) -> list[list[int]]:
    batches, found = iter(loader), []
    for _ in range(count):
        batch = next(batches)
        found.append(sorted(batch[:, 0].tolist()))
        engine.backward(engine(batch))
        engine.step()
    return found


def save_and_resume(folder: Path) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    (folder / "cluster").mkdir()
    write_index(folder / "samples", [[i for i in range(_SIZE) if i % 8 == level] for level in range(8)])
    engine, loader = make_engine(folder)
    first = batches_of(engine, loader, 2)
    engine.save_checkpoint(folder / "checkpoints")
    expected = batches_of(engine, loader, 2)
    finish(engine)
    engine, loader = make_engine(folder)
    engine.load_checkpoint(folder / "checkpoints")
    found = batches_of(engine, loader, 2)
    finish(engine)
    return first, expected, found


def test_a_curriculum_goes_on_where_it_was(one_rank: RankPool, tmp_path: Path) -> None:
    """After a resume the first batches came again."""
    ((first, expected, found),) = one_rank.run(save_and_resume, tmp_path)
    assert found == expected
    assert found != first
