"""DeepSpeed's curriculum over a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder
from torch import Tensor
from torch.utils.data import Dataset

from narrowgauge.engine import initialize
from narrowgauge.engine.errors import CheckpointError, ConfigError
from tests.support.models import tiny
from tests.support.ranks import RankPool
from tests.support.zero import finish

_SIZE = 32
_SCHEDULES: dict[str, dict[str, Any]] = {
    "fixed_linear": {"total_curriculum_step": 10, "difficulty_step": 1},
    "fixed_root": {"total_curriculum_step": 10, "difficulty_step": 1, "root_degree": 2},
    "fixed_discrete": {"difficulty": [2, 4, 8], "max_step": [2, 4]},
}
_PARAMS: dict[str, dict[str, Any]] = {"Grass": {"density": 0.5}, "GaLore": {"rank": 4}, "AdamW": {}}
# A batch's samples in their order, and its loss.
_Seen = list[tuple[list[int], float]]


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


def make_engine(folder: Path, optimizer: str, schedule: str, *, seed: int = 1, workers: int = 0) -> tuple[Any, Any]:
    metric = {
        "index_to_sample_path": str(folder / "samples"),
        "index_to_metric_path": str(folder / "metrics"),
        "difficulty_type": "value",
        "clustering_type": "schedule_based",
        "min_difficulty": 2,
        "max_difficulty": 8,
        "schedule_type": schedule,
        "schedule_config": _SCHEDULES[schedule],
    }
    learning = {"enabled": True, "data_cluster_path": str(folder / "cluster"), "curriculum_metrics": {"m": metric}}
    sampling = {"enabled": True, "num_epochs": 9, "num_workers": workers, "curriculum_learning": learning}
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2, **_PARAMS[optimizer]}},
        "data_efficiency": {"enabled": True, "seed": seed, "data_sampling": sampling},
    }
    engine, _, loader, _ = initialize(model=tiny(blocks=1), config=config, training_data=Samples())
    return engine, loader


def train(engine: Any, loader: Any, count: int) -> _Seen:
    batches, found = iter(loader), []
    for _ in range(count):
        batch = next(batches)
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        found.append((batch[:, 0].tolist(), loss.item()))
    return found


def write_data(folder: Path) -> None:
    """Eight levels of difficulty, of four samples each."""
    if dist.get_rank() == 0:
        (folder / "cluster").mkdir()
        write_index(folder / "samples", [[i for i in range(_SIZE) if i % 8 == level] for level in range(8)])
        write_index(folder / "metrics", [[level + 1] for level in range(8)])
    dist.barrier()


def save_and_resume(folder: Path, optimizer: str, schedule: str) -> tuple[_Seen, list[_Seen]]:
    """What an uninterrupted run sees after five steps, with clusters shuffled again, and two that are resumed there."""
    write_data(folder)
    engine, loader = make_engine(folder, optimizer, schedule)
    train(engine, loader, 5)
    engine.save_checkpoint(folder / "checkpoints")
    expected, found = train(engine, loader, 9), []
    finish(engine)
    for _ in range(2):
        engine, loader = make_engine(folder, optimizer, schedule)
        engine.load_checkpoint(folder / "checkpoints")
        found.append(train(engine, loader, 9))
        finish(engine)
    return expected, found


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ("Grass", "fixed_linear"),
        pytest.param("GaLore", "fixed_root", marks=pytest.mark.slow),
        pytest.param("AdamW", "fixed_discrete", marks=pytest.mark.slow),
    ],
)
def test_a_curriculum_goes_on_where_it_was(two_ranks: RankPool, tmp_path: Path, optimizer: str, schedule: str) -> None:
    """DeepSpeed draws from the beginning of its generator again, out of clusters that were shuffled since."""
    for expected, found in two_ranks.run(save_and_resume, tmp_path, optimizer, schedule):
        for seen in found:
            assert [samples for samples, _ in seen] == [samples for samples, _ in expected]
            # AdamW's state is restored by DeepSpeed itself, not to the last bit.
            rtol = 0.0 if optimizer != "AdamW" else 1e-5
            assert [loss for _, loss in seen] == pytest.approx([loss for _, loss in expected], rel=rtol, abs=0.0)


def resume_with_another_seed(folder: Path) -> str:
    write_data(folder)
    engine, loader = make_engine(folder, "Grass", "fixed_root")
    train(engine, loader, 2)
    engine.save_checkpoint(folder / "checkpoints")
    finish(engine)
    engine, _ = make_engine(folder, "Grass", "fixed_root", seed=2)
    try:
        engine.load_checkpoint(folder / "checkpoints")
    except CheckpointError as error:
        return str(error)
    finally:
        finish(engine)
    return ""


def with_workers(folder: Path) -> str:
    try:
        make_engine(folder, "Grass", "fixed_root", workers=2)
    except ConfigError as error:
        return str(error)
    return ""


def test_another_curriculum_and_workers_are_refused(one_rank: RankPool, tmp_path: Path) -> None:
    (said,) = one_rank.run(resume_with_another_seed, tmp_path)
    assert "data_efficiency: expected the batch size, seed, schedule and data that the curriculum began with" in said
    (said,) = one_rank.run(with_workers, tmp_path)
    assert said.endswith("data_efficiency.data_sampling.num_workers: expected 0 with curriculum_learning, got 2")
