"""Tiny models of the families that the ``megatron`` engine builds."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Nothing divides it: the vocabulary is padded wherever it is cut.
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "norm_topk_prob": True},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40},
}


def model_block(family: str, **changes: Any) -> dict[str, Any]:
    """``model.config`` of a configuration."""
    return {"model_type": family, **SIZES, **FAMILIES[family], **changes}


def hf_config(family: str, **changes: Any) -> PretrainedConfig:
    block = model_block(family, **changes)
    return AutoConfig.for_model(block.pop("model_type"), **block)
