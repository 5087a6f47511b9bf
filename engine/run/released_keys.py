"""Keys of released configuration files that this version of transformers does not read: older ones did, or the code
that the weights were trained by.
"""

# Of many types.
_NOTES = {
    "is_llama_config",
    "model_max_length",
    "prefix",
    "quantization_config",
    "rope_interleaved",
    "tokenizer_class",
    "tokenizer_name",
    "transformers.js_config",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    # Of heads that are no language model's.
    *(f"summary_{key}" for key in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")),
}
_DEEPSEEK = {"aux_loss_alpha", "ep_size", "moe_layer_freq", "scoring_func", "seq_aux", "topk_method"}
_MAMBA = {"fused_add_norm", "pad_vocab_size_multiple", "rms_norm", "ssm_cfg"}
_ROTARY = {"rotary", "scale_attn_weights"}
_SOFTMAX = {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "scale_attn_weights"}
_OF_TYPE = {
    "bloom": {
        *("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "n_inner", "offset_alibi"),
        *("seq_length", "skip_bias_add", "skip_bias_add_qkv"),
    },
    "codegen": _ROTARY,
    "cohere2": {
        *("layer_switch", "order_of_interleaved_layers", "position_embedding_type", "rotary_pct"),
        *("use_embedding_sharing", "use_gated_activation", "use_parallel_block", "use_parallel_embedding"),
    },
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "falcon": {"apply_residual_connection_post_layernorm"},
    "falcon_mamba": _MAMBA,
    "gemma": {"hidden_activation"},
    "gemma2": {"hidden_act", "sliding_window_size"},
    "gpt_bigcode": {
        *("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache"),
        "validate_runner_input",
    },
    "gpt_oss": {"initial_context_length"},
    "gptj": _ROTARY,
    "llama": {"max_sequence_length"},
    "llama4_text": {"for_llm_compressor"},
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "mpt": {"init_config", "verbose"},
    "opt": {"activation_dropout"},
    "phi3": {"attention_bias"},
    "qwen2": {"use_mrope"},
    "smollm3": {"max_window_layers"},
    "stablelm": {"norm_eps", "rope_pct", "rotary_scaling_factor"},
    "starcoder2": {*_SOFTMAX, "activation_function", "layer_norm_epsilon", "mlp_type", "norm_type"},
}
_SIZES = {"d_inner": "intermediate_size", "d_model": "hidden_size", "n_layer": "num_hidden_layers"}
# The same number a second time; without the first it would be left out without being meant to.
_TWICE = {
    "falcon_mamba": _SIZES,
    "gpt_oss": {"experts_per_token": "num_experts_per_tok"},
    "mamba": _SIZES,
    "mamba2": _SIZES,
}


def is_left_out(key: str, settings: dict[str, object], model_type: str) -> bool:
    """Whether a key that transformers does not read is one of released files, which changes nothing."""
    if key == "gradient_checkpointing":
        # Asked for by a key of our own, of the block.
        return not settings[key]
    if key in _NOTES or key in _OF_TYPE.get(model_type, ()):
        return True
    first = _TWICE.get(model_type, {}).get(key)
    return first is not None and settings.get(first) == settings[key]
