"""A layout's run under Megatron against that of one process of the ``ddp`` engine."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import Run, run_steps
from tests.support.zero import worst


def run_of_ddp(ranks: MegatronPool, family: str, optimizer: dict[str, Any], *, last: int) -> Run:
    """What one process of the ``ddp`` engine finds."""
    (found,) = ranks.run(run_steps, "ddp", family, ranks=1, last=last, optimizer=optimizer)
    return found


def assert_equal_runs(found: Sequence[Run], expected: Run, **bound: Any) -> None:
    """Losses and norms of each rank, and the weights, which the first has, are those expected.

    Args:
        bound: of losses, ``rel`` or ``abs`` of :func:`pytest.approx`.
    """
    steps, evaluated, weights = expected
    for number, (own, evaluation, whole) in enumerate(found):
        assert [loss for loss, _ in own] == pytest.approx([loss for loss, _ in steps], **bound)
        assert [norm for _, norm in own] == pytest.approx([norm for _, norm in steps], rel=5e-5)
        assert evaluation == pytest.approx(evaluated, **bound)
        if number == 0:
            assert worst(whole, weights) < 2e-5
