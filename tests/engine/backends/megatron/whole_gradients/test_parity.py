"""Optimizers on whole gradients in every layout against one process of the ``ddp`` engine: norms, projections and
selections are of the model's own weights, wherever their pieces lie.

With accumulation, clipping, decay and a schedule.
"""

from functools import cache
from typing import Any

import pytest
import torch

from tests.support.cases import cases
from tests.support.megatron_parity import assert_equal_runs, run_of_ddp
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import run_steps

from ..compact.test_parity import LAYOUTS as DENSE_LAYOUTS
from ..compact.test_parity import OVERLAP, PLAIN, PP2, SP, TP2

STEPS = 8
# Two changes of subspace.
BASE: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4, "refresh_interval": 3, "weight_decay": 0.1}
LAMB: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1}
LARS: dict[str, Any] = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.02}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lamb": {"type": "Lamb", "params": LAMB},
    "lamb-bounds": {"type": "Lamb", "params": {**LAMB, "weight_norm_bounds": [0.1, 1.0], "exclude": ["*norm*"]}},
    # Some of these globs match nothing on one of two stages.
    "lamb-stages": {"type": "Lamb", "params": {**LAMB, "exclude": ["*.layers.0.*", "*.layers.3.mlp.*", "lm_head*"]}},
    "lars": {"type": "Lars", "params": LARS},
    "lars-nesterov": {"type": "Lars", "params": {**LARS, "nesterov": True, "exclude": ["*norm*", "*k_proj*"]}},
    "frugal": {"type": "Frugal", "params": {**BASE, "density": 0.25}},
    "frugal-rows": {"type": "Frugal", "params": {**BASE, "density": 0.4, "selection": "rows", "state_free": "SGD"}},
    "frugal-randk": {"type": "Frugal", "params": {**BASE, "density": 0.25, "selection": "randk"}},
    "frugal-blocks": {"type": "Frugal", "params": {**BASE, "density": 0.25, "selection": "blockwise"}},
    "frugal-svd": {"type": "Frugal", "params": {**BASE, "density": 0.25, "selection": "svd", "state_free": "SGD"}},
    "frugal-stages": {
        "type": "Frugal",
        "params": {**BASE, "density": 0.25, "target_modules": ["*.layers.1.*", "*.layers.2.mlp.*"]},
    },
    "frugal-random": {"type": "Frugal", "params": {**BASE, "density": 0.2, "selection": "random"}},
    "apollo": {"type": "Apollo", "params": {**BASE, "rank": 4}},
    "apollo-free": {"type": "Apollo", "params": {**BASE, "rank": 3, "norm_growth_limit": None, "scale": 0.5}},
    "apollo-mini": {"type": "Apollo", "params": {**BASE, "rank": 1, "scale_type": "tensor", "scale": 4.0}},
    "apollo-groups": {
        "type": "Apollo",
        "params": {
            **BASE,
            "rank": 4,
            "target_modules": ["*.mlp.*"],
            "matrix_lr_scale": 0.5,
            "param_groups": [{"params": ["*layernorm*"], "weight_decay": 0.0}],
        },
    },
}
EP2, ETP1, ETP2 = {"expert_parallel": 2}, {"expert_tensor_parallel": 1}, {"expert_tensor_parallel": 2}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-experts": (1, {}),
    "EP2": (2, EP2),
    "EP2-plain": (4, {**EP2, **PLAIN}),
    "EP2-ETP2": (4, {**EP2, **ETP2}),
    "TP2-SP-EP2-ETP1": (4, {**TP2, **SP, **EP2, **ETP1}),
    "PP2-EP2-overlap": (4, {**PP2, **EP2, **OVERLAP}),
}
LAYOUTS = {**DENSE_LAYOUTS, **EXPERT_LAYOUTS}

FEW = ("TP2-SP-DP2-overlap", "TP2-DP2-plain", "EP2-ETP2")
MANY = {"lamb": LAYOUTS, "frugal": LAYOUTS, "apollo": LAYOUTS, "frugal-svd": [*FEW, "PP2", "EP2-plain"]}
MANY |= {
    "lamb-stages": ["PP2", "VPP"],
    "frugal-stages": ["PP2"],
    "frugal-randk": ["DP2", "PP2", "EP2"],
    "apollo-groups": ["TP2-SP-PP2"],
}


def family(layout: str) -> str:
    return "mixtral" if layout in EXPERT_LAYOUTS else "llama"


CASES: dict[str, tuple[str, str, str]] = {
    f"{optimizer}-{layout}": (optimizer, layout, family(layout))
    for optimizer in OPTIMIZERS
    for layout in MANY.get(optimizer, FEW)
}
CASES |= {
    # Each tensor-parallel rank uses these norms for its own heads; the head is a copy of the embedding.
    "lamb-head-norms": ("lamb", "TP2", "qwen3"),
    "lamb-tied": ("lamb", "TP2-SP-PP2", "qwen2"),
    "lars-shared": ("lars", "TP2-SP-EP2-ETP1", "qwen2_moe"),
}
QUICK = {
    "lamb-stages-PP2",
    "frugal-TP2-SP-PP2",
    "apollo-mini-EP2-ETP2",
}


@pytest.fixture(scope="module")
def expected(megatron_ranks: MegatronPool) -> Any:
    """What one process of the ``ddp`` engine finds; once each."""
    return cache(lambda name, family: run_of_ddp(megatron_ranks, family, OPTIMIZERS[name], last=STEPS))


@pytest.mark.parametrize(("optimizer", "layout", "family"), cases(CASES, slow=CASES.keys() - QUICK))
def test_a_layout_equals_one_process_of_ddp(
    megatron_ranks: MegatronPool, expected: Any, optimizer: str, layout: str, family: str
) -> None:
    ranks, block = LAYOUTS[layout]
    more = {"last": STEPS, "optimizer": OPTIMIZERS[optimizer]}
    results = megatron_ranks.run(run_steps, "megatron", family, block, ranks=ranks, **more)
    assert_equal_runs(results, expected(optimizer, family), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "TP2", "TP2-SP-DP2-overlap", "TP2-SP-PP2"])
def test_the_sign_of_what_is_all_rounding_is_either(megatron_ranks: MegatronPool, layout: str) -> None:
    """Outside of a subspace of singular vectors Frugal steps by the sign of what is left of the gradient. Of some
    50,000 elements a step one or two are left with nothing but rounding: such an element goes a rate up or down in one
    engine and the other way in another, also on one process. All others agree, until a later step sees it.
    """
    optimizer = {"type": "Frugal", "params": {**BASE, "weight_decay": 0.0, "density": 0.25, "selection": "svd"}}
    _, _, expected = run_of_ddp(megatron_ranks, "llama", optimizer, last=3)
    ranks, block = LAYOUTS[layout]
    _, _, found = megatron_ranks.run(run_steps, "megatron", "llama", block, ranks=ranks, last=3, optimizer=optimizer)[0]
    off = torch.cat([(found[name] - own).abs().view(-1) for name, own in expected.items()])
    others = off[off > 1e-6]
    assert len(others) <= 4
    # Twice the rate of the first, the second or the third step, of a warm-up.
    rates = torch.tensor([1e-2 * step / 3 for step in (1, 2, 3)])
    assert all(float((other - 2 * rates).abs().min()) < 1e-6 for other in others)
