"""Lightning trains with our optimizers: to the weights of a plain loop around ``initialize``."""

from pathlib import Path

import pytest

from tests.integrations.fine_tuning import train_by_loop, trained_by_lightning, weights_in
from tests.support.ranks import RankPool
from tests.support.zero import worst

slow = pytest.mark.slow
POOLS = {1: "one_rank", 2: "two_ranks"}


@pytest.mark.parametrize(
    ("ranks", "stage", "save_at"),
    [(2, 1, 3), *(pytest.param(*case, marks=slow) for case in ((1, 0, None), (1, 2, None), (2, 2, None), (2, 3, 3)))],
)
def test_weights_are_those_of_a_plain_loop(
    ranks: int, stage: int, save_at: int | None, one_rank: RankPool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pool: RankPool = request.getfixturevalue(POOLS[ranks])
    pool.run(trained_by_lightning, tmp_path, stage=stage, save_at=save_at)
    one_rank.run(train_by_loop, tmp_path / "loop", in_module=True)
    assert worst(weights_in(tmp_path), weights_in(tmp_path / "loop")) < 1e-5
