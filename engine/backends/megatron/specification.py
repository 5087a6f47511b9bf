"""What Megatron builds a layer from."""

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import nn

from .architecture import Architecture
from .attention import CausalAttention
from .kernels import Kernels
from .keys import BalanceLoss
from .router import CountingRouter


def block_specification(
    architecture: Architecture, num_layers: int, balance: BalanceLoss, kernels: Kernels
) -> TransformerBlockSubmodules:
    """Layers and the norm after the last of them. Column- and row-parallel layers are Megatron's own."""
    norm: Any = _Norm
    if kernels.norm:
        from megatron.core.extensions.transformer_engine import TENorm as norm
    spec = get_gpt_layer_local_spec(
        num_experts=architecture.num_experts or None, qk_layernorm=architecture.qk_norm, normalization="RMSNorm"
    )
    parts: Any = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if kernels.attention:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        attention.core_attention = TEDotProductAttention
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    if architecture.num_experts:
        router = partial(CountingRouter, balance=balance, coefficient=architecture.balance_coefficient)
        parts.mlp.submodules.router = router
        if kernels.grouped:
            parts.mlp.submodules.experts = _grouped_experts()
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)


def _grouped_experts() -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    linears: Any = (TEColumnParallelGroupedLinear, TERowParallelGroupedLinear)
    return ModuleSpec(module=TEGroupedMLP, submodules=MLPSubmodules(*linears))


class _Norm:
    """torch's RMSNorm, whose weight says that it sees only a part of the sequence."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> Any:
        norm = nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
        return norm
