"""The benchmark of a step's told seconds, without its clock: what is told follows the rates and the configuration."""

import pytest

from benchmarks.plan_time import CASES, Measured, config_of
from narrowgauge.engine.forecast.forecast import Seconds, forecast, seconds_of
from narrowgauge.engine.run.validate import check_for

HIDDEN, WIDE, LAYERS, TOKENS, LENGTH = 512, 1376, 4, 512, 256


def told(name: str, flops: float = 1e9) -> Seconds:
    config = config_of(CASES[name])
    _, described = check_for(config, 1)
    found = forecast(config, described, world_size=1)
    return seconds_of(config, found.batches, *found.ranks[0], Measured(gpus=1, flops=flops, bytes_per_second=1e9))


@pytest.mark.slow
def test_seconds_follow_rates_and_configuration() -> None:
    plain = told("AdamW")
    # Six for each weight of the layers and the head; of attention two products in forward and five in backward.
    weights = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * WIDE) + HIDDEN * 4096
    attention = LAYERS * 7 * 2 * TOKENS * LENGTH * HIDDEN
    assert plain.products * 1e9 == pytest.approx(6 * TOKENS * weights + attention, rel=1e-3)
    assert told("AdamW", 2e9).products == pytest.approx(plain.products / 2)
    twice = told("AdamW, two micro-batches")
    assert (twice.products, twice.operations) == pytest.approx((2 * plain.products, 2 * plain.operations))
    assert 1.2 < told("AdamW, layers recomputed").products / plain.products < 4 / 3
    assert told("Grass, columns 1/8").step < plain.step
