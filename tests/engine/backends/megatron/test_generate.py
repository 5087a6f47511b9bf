"""Text from a model that is cut over process ranks: what transformers generates from its whole weights."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.cases import cases
from tests.support.megatron_models import hf_config
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import make_engine, run_config, train, weights_of

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8},
}
# Five tokens: no two sequence-parallel ranks share them evenly.
PROMPT, LENGTH, SEED = [[5, 17, 99, 3, 42]], 6, 11

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "TP2-SP-VPP": (
        "llama",
        4,
        {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2, "virtual_pipeline": 2},
    ),
    "TP2-SP": ("llama", 2, {"tensor_parallel": 2, "sequence_parallel": True}),
    "CP2-PP2": ("llama", 4, {"context_parallel": 2, "pipeline_parallel": 2}),
    "VPP": ("llama", 2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "DP2-overlap": ("llama", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tied-TP2": ("qwen2", 2, {"tensor_parallel": 2}),
    "EP2": ("mixtral", 2, {"expert_parallel": 2}),
}


def continued(generate: Any) -> list[Tensor]:
    """By both ways of choosing the next token, from the same random state."""
    found = []
    for options in OPTIONS.values():
        torch.manual_seed(SEED)
        tokens = torch.tensor(PROMPT)
        mask = torch.ones_like(tokens)
        found.append(generate(tokens, attention_mask=mask, max_new_tokens=LENGTH, pad_token_id=0, **options))
    return found


def of_the_engine(family: str, layout: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    engine = make_engine(run_config("megatron", family, layout), family)
    train(engine, 0, 1)
    engine.module.eval()
    found = continued(partial(engine.generate, before_forward=lambda: None))
    weights = weights_of(engine)
    engine.close()
    return found, weights


@pytest.mark.parametrize(("family", "ranks", "layout"), cases(CASES, slow=CASES.keys() - {"TP2-SP", "VPP"}))
def test_the_engine_generates_what_transformers_does(
    megatron_ranks: MegatronPool, family: str, ranks: int, layout: dict[str, Any]
) -> None:
    found = megatron_ranks.run(of_the_engine, family, layout, ranks=ranks)
    whole: Any = AutoModelForCausalLM.from_config(hf_config(family))
    missing, unexpected = whole.load_state_dict(found[0][1], strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    whole.tie_weights()
    expected = continued(whole.eval().generate)
    assert all(tokens.shape == (1, len(PROMPT[0]) + LENGTH) for tokens in expected)
    assert len({tuple(tokens[0].tolist()) for tokens in expected}) == len(OPTIONS)
    for tokens, _ in found:
        assert all(map(torch.equal, tokens, expected))
