"""The Trainer ends at the weights of ``narrowgauge train`` on the same batches."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.integrations.fine_tuning import STEPS, weights_in
from tests.integrations.on_records import config_of, made_inputs, samples, trained_by_trainer
from tests.support import forked
from tests.support.ranks import RankPool
from tests.support.zero import worst

pytest.importorskip("datasets")


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(1, None), *(pytest.param(2, stage, marks=pytest.mark.slow) for stage in (None, 0, 1, 2, 3))],
)
def test_weights_are_those_of_narrowgauge_train(
    ranks: int, stage: int | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Chats of different lengths, a part of each learned: both weigh every learned token of a step alike."""
    made_inputs(tmp_path)
    result = forked.run("train", str(config_of(tmp_path, tmp_path / "run", stage=stage, ranks=ranks)), ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = {int((sample["labels"] != -100).sum()) for sample in samples(tmp_path)}
    assert max(counts) > 3 * min(counts)
    pool: RankPool = request.getfixturevalue({1: "one_rank", 2: "two_ranks"}[ranks])
    pool.run(trained_by_trainer, tmp_path, tmp_path / "trainer", stage=stage)
    trained = weights_in(tmp_path / "run" / "checkpoints" / f"step-{STEPS}")
    assert worst(weights_in(tmp_path / "trainer"), trained) < 1e-5
    assert worst(LlamaForCausalLM.from_pretrained(tmp_path / "base").state_dict(), trained) > 1e-3
