"""How stages send to each other: two settings of Megatron's that give wrong numbers without a word are never made."""

from typing import Any

import pytest

from narrowgauge.engine.backends.megatron.keys import MegatronBlock
from tests.support.megatron_models import hf_config
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import run_steps

INTERLEAVED = {"pipeline_parallel": 2, "virtual_pipeline": 2}
LAYOUTS: list[dict[str, Any]] = [
    {"pipeline": 1},
    {"pipeline": 2},
    {"pipeline": 4},
    {"pipeline": 2, "chunks": 2},
    {"pipeline": 4, "chunks": 2, "tensor": 2, "expert_tensor": 2},
]
KEYS = ("overlap_p2p_comm", "batch_p2p_comm", "deallocate_pipeline_outputs")


def settings() -> list[tuple[bool, bool, bool]]:
    import torch

    from narrowgauge.engine.backends.megatron.architecture import architecture_of
    from narrowgauge.engine.backends.megatron.layout import Layout
    from narrowgauge.engine.backends.megatron.model import transformer_config

    made = [
        transformer_config(architecture_of(hf_config("llama")), Layout(**sizes), MegatronBlock(), torch.float32)
        for sizes in LAYOUTS
    ]
    return [tuple(getattr(config, key) for key in KEYS) for config in made]


def test_no_layout_makes_them(megatron_ranks: MegatronPool) -> None:
    """Interleaved stages in one batch of messages; outputs that are given back while they are still sent."""
    (found,) = megatron_ranks.run(settings, ranks=1)
    for sizes, (overlaps, is_batch, gives_back) in zip(LAYOUTS, found, strict=True):
        if sizes.get("chunks", 1) > 1:
            assert overlaps
            assert not is_batch
        assert not (overlaps and gives_back)
    assert not {*KEYS} & MegatronBlock.model_fields.keys()


def in_one_batch() -> Any:
    """Interleaved, with what Megatron sets by itself."""
    from narrowgauge.engine.backends.megatron import cpu, model

    found: dict[str, Any] = {"overlap_p2p_comm": False, "batch_p2p_comm": True, "deallocate_pipeline_outputs": False}
    with cpu.replaced(model, _pipeline=lambda layout: found):
        return run_steps("megatron", "llama", INTERLEAVED, last=1)


@pytest.mark.slow
def test_the_first_is_still_there(megatron_ranks: MegatronPool) -> None:
    """Where it is not, this says so: interleaved stages could send in batches."""
    (expected,), _, _ = megatron_ranks.run(run_steps, "ddp", "llama", ranks=1, last=1)[0]
    (found,), _, _ = megatron_ranks.run(in_one_batch, ranks=2)[0]
    assert abs(found[0] - expected[0]) > 1e-4
