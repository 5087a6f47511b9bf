"""What this engine knows of a model: the sizes and variants of the decoder families that it builds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder with rotary positions, RMS norms and gated linear units.

    Attributes:
        head_dim: width of a head.
        tied: the head is the embedding.
        qkv_bias: queries, keys and values have a bias.
        qk_norm: queries and keys are normed by head.
        num_experts: per layer; 0 where the layers are dense.
        expert_width: hidden units of an expert.
        renormalized: the chosen experts' weights sum to one.
        shared_width: hidden units of the expert that every token takes; 0 for none.
        balance_coefficient: of a balance loss.
    """

    model_type: str
    num_layers: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    rope_theta: float
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    renormalized: bool = True
    shared_width: int = 0
    balance_coefficient: float = 0.0

    def padded_vocab(self, tensor: int) -> int:
        """The least multiple of the process ranks that share the vocabulary."""
        return -(-self.vocab // tensor) * tensor


def architecture_of(config: Any, sequence_length: int | None = None) -> Architecture:
    """The architecture of a Hugging Face configuration.

    Args:
        sequence_length: of the data; a sliding window at least as long changes nothing.

    Raises:
        ValueError: all that this engine does not build, ``key: expected ..., got ...`` each, a line apiece.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, got {config.model_type!r}")
    if problems := list(_unsupported(config, sequence_length)):
        raise ValueError("\n".join(problems))
    is_qwen2 = config.model_type in ("qwen2", "qwen2_moe")
    experts = _experts(config)
    return Architecture(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        width=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=is_qwen2 and bool(getattr(config, "qkv_bias", True)),
        qk_norm=config.model_type in ("qwen3", "qwen3_moe"),
        norm_eps=config.rms_norm_eps,
        rope_theta=_rope(config)["rope_theta"],
        **experts,
    )


def _experts(config: Any) -> dict[str, Any]:
    if config.model_type == "mixtral":
        return {
            "num_experts": config.num_local_experts,
            "experts_per_token": config.num_experts_per_tok,
            "expert_width": config.intermediate_size,
            "balance_coefficient": config.router_aux_loss_coef,
        }
    if config.model_type not in ("qwen2_moe", "qwen3_moe"):
        return {}
    return {
        "num_experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_width": config.moe_intermediate_size,
        "renormalized": bool(config.norm_topk_prob),
        "shared_width": getattr(config, "shared_expert_intermediate_size", 0),
        "balance_coefficient": config.router_aux_loss_coef,
    }


def _rope(config: Any) -> dict[str, Any]:
    return config.rope_parameters


def _unsupported(config: Any, sequence_length: int | None) -> Iterator[str]:
    """What is set and not built."""
    expected: dict[str, Any] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
    }
    for key, value in expected.items():
        found = getattr(config, key, value)
        if found != value and not (not found and not value):
            yield f"{key}: expected {value!r} with the megatron engine, got {found!r}"
    if getattr(config, "mlp_only_layers", None):
        yield f"mlp_only_layers: expected none with the megatron engine, got {config.mlp_only_layers}"
    window = getattr(config, "sliding_window", None)
    if window and (sequence_length is None or window < sequence_length):
        yield (
            f"sliding_window: expected none, or at least the sequence length ({sequence_length}), with the megatron"
            f" engine, got {window}"
        )
    rope = _rope(config)
    if rope.get("rope_type", "default") != "default":
        yield f"rope_parameters.rope_type: expected 'default' with the megatron engine, got {rope['rope_type']!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor: expected 1.0 with the megatron engine, got {rope['partial_rotary_factor']}"
