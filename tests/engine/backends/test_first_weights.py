"""Weights from scratch against transformers' own, with every engine."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.config.run_blocks import ModelBlock
from narrowgauge.optimizers.numerics.seeds import derive_seed
from tests.support.families import small
from tests.support.family_record import recorded
from tests.support.ranks import RankPool

SIZES = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4}
ATTENTION = {**SIZES, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT = {"vocab_size": 320, "n_embd": 64, "n_layer": 8, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": ATTENTION,
    "llama-tied": {**ATTENTION, "model_type": "llama", "tie_word_embeddings": True, "pad_token_id": 3},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "mamba": {**SIZES, "state_size": 8},
    "mamba2": {**SIZES, "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2},
    "falcon_mamba": {**SIZES, "state_size": 8},
    "nanochat": {**ATTENTION, "head_dim": 16},
    "recurrent_gemma": {**ATTENTION, "head_dim": 16, "lru_width": 64, "attention_window_size": 16},
    "gpt_oss": {**ATTENTION, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {**ATTENTION, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
}


# No rule of transformers draws the first GPT's matrices, which their constructor does.
OTHERS = sorted({name for name, found in recorded().items() if "share" in found} - FAMILIES.keys() - {"openai-gpt"})


def config_of(family: str) -> Any:
    if family not in FAMILIES:
        return small(family)
    settings = {"model_type": family, **FAMILIES[family]}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def built(
    family: str, engine: str, stage: int = 0, initial_weights: Literal["by_name", "transformers"] = "by_name"
) -> dict[str, Tensor]:
    """The weights that an engine starts from."""
    raw = {
        "engine": engine,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "training": {"steps": 1, "seed": 5},
    }
    block = ModelBlock(config={"model_type": family}, initial_weights=initial_weights)
    model = backend_of(engine).construct(block, config_of(family), load_config(raw))
    if stage < 3:
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    import deepspeed

    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def by_transformers(family: str) -> dict[str, Tensor]:
    """transformers' own initialization of a whole model, told a seed before each module."""
    config = config_of(family)
    tied, config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False), False
    model: Any = AutoModelForCausalLM.from_config(config)
    names = {id(module): name for name, module in model.named_modules()}

    def seeded(self: PreTrainedModel, module: nn.Module, is_custom_code: bool = False) -> None:
        torch.manual_seed(derive_seed(5, "weights", names[id(module)]))
        self._init_weights(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "_initialize_weights", seeded)
        model.initialize_weights()
    return {name: p.detach() for name, p in model.named_parameters() if not (tied and name == "lm_head.weight")}


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_they_are_the_models_own(family: str) -> None:
    """Parents were drawn before their children, which undid what they had written: the scaled outputs of GPT-2, the
    time steps of Mamba; and a tied embedding was drawn by the rule for the head.
    """
    found, expected = built(family, "ddp"), by_transformers(family)
    if family in FAMILIES:
        assert found.keys() == expected.keys()
    # What is tied goes by one of its names in each.
    with torch.device("meta"):
        tied = getattr(AutoModelForCausalLM.from_config(config_of(family)), "all_tied_weights_keys", {})
    both = (found.keys() & expected.keys()) - set(tied)
    assert len(both) >= len(found) - 2
    for name in both:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_they_are_distributed_as_without_seeds_of_their_own(family: str) -> None:
    """Against plain ``from_config``, whose draws are others."""
    found = built(family, "ddp")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of(family))
    for name, value in ((name, p.detach()) for name, p in model.named_parameters()):
        if value.numel() >= 512:
            assert float(found[name].std()) == pytest.approx(float(value.std()), rel=0.2, abs=1e-6), name
            assert abs(float(found[name].mean() - value.mean())) <= 0.2 * float(value.std()) + 1e-6, name
        elif float(value.std(correction=0)) == 0:
            assert torch.equal(found[name], value), name


def built_at_stages(family: str) -> list[dict[str, Tensor]]:
    return [built(family, "deepspeed", stage) for stage in (0, 3)]


def test_what_no_rule_draws_is_the_same_at_every_stage(two_ranks: RankPool) -> None:
    """transformers leaves out what constructors draw for ZeRO-3: the first GPT started from whatever was in memory."""
    expected = built("openai-gpt", "ddp")
    matrices = torch.cat([p.flatten() for name, p in expected.items() if name.endswith("c_fc.weight")])
    assert float(matrices.std()) == pytest.approx(0.02, rel=0.05)
    for stages in two_ranks.run(built_at_stages, "openai-gpt"):
        for found in stages:
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), name


CHEAP = ("llama-tied", "gpt2", "mamba", "recurrent_gemma")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in CHEAP else pytest.mark.slow) for name in FAMILIES]
)
def test_sharded_models_start_from_the_same(two_ranks: RankPool, family: str) -> None:
    """At ZeRO-3, where a rule sees only what has been gathered for it, Mamba was a RuntimeError."""
    expected = by_transformers(family)
    for stages in two_ranks.run(built_at_stages, family):
        for found in stages:
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), name


def from_one_stream(family: str) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    return {name: p.detach() for name, p in model.named_parameters()}


def built_from_one_stream(family: str) -> list[tuple[dict[str, Tensor], Tensor]]:
    """The weights at each stage, and the state of the random numbers after them."""
    return [(built(family, "deepspeed", stage, "transformers"), torch.get_rng_state()) for stage in (0, 3)]


@pytest.mark.quick("gpt2", "mamba")
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS, "openai-gpt"])
def test_the_stream_of_transformers_is_drawn_on_request(two_ranks: RankPool, family: str) -> None:
    """Bit for bit those of ``from_config`` after a seed, without engine, on every rank of ZeRO-0 and 3."""
    expected = from_one_stream(family)
    built(family, "ddp")
    state = torch.get_rng_state()
    found = [(built(family, "ddp", 0, "transformers"), torch.get_rng_state())]
    for ranks_found in two_ranks.run(built_from_one_stream, family):
        found += ranks_found
    for weights, after in found:
        assert weights.keys() == expected.keys()
        assert torch.equal(after, state)
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name
