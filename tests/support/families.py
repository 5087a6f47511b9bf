"""Causal language models of transformers at a size that trains in a second."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 320),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "lru_width"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads", "n_groups", "linear_num_key_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank", "mamba_d_head", "sliding_window"), 16),
    **dict.fromkeys(("attention_window_size",), 16),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size"), 8),
    **dict.fromkeys(("mamba_d_state", "mamba_n_heads", "linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_value_heads": 4,
    # Of models that else are trained on masked tokens.
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Dropout is drawn otherwise where ranks share a batch.
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"), 0.0),
    **dict.fromkeys(
        ("activation_dropout", "residual_dropout", "resid_dropout", "embd_dropout", "attn_dropout", "ffn_dropout"), 0.0
    ),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "layerdrop", "classifier_dropout"), 0.0),
}


# What the sizes above do not fit.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bailing_hybrid": {"n_group": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_group_size": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "kimi_linear": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2},
    "reformer": {
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "attention_head_size": 16,
        "local_attn_chunk_length": 16,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "xmod": {"default_language": "en_XX"},
    # transformers sets the row of the token for padding to zero when it loads weights, too.
    "youtu": {"pad_token_id": None},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def sizes_of(family: str) -> dict[str, Any]:
    """Keys of a family's configuration that make it small."""
    kind = type(AutoConfig.for_model(family))
    names = {*kind().to_dict(), *kind.attribute_map}
    # A size that has two names is told under its own.
    sizes = {key: value for key, value in _SIZES.items() if key in names and key not in kind.attribute_map}
    if "qk_rope_head_dim" in names:
        # Latent attention: every head has its own keys, and only a part of each is rotated.
        sizes |= {"num_key_value_heads": 4, **({"head_dim": sizes["qk_rope_head_dim"]} if "head_dim" in names else {})}
    return sizes | _OF_FAMILY.get(family, {})


def small(family: str) -> PretrainedConfig:
    """A family's configuration with all its sizes small."""
    return AutoConfig.for_model(family, **sizes_of(family))
