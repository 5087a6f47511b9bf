"""Causal attention by PyTorch's own kernels, which need neither Transformer Engine nor the whole table of scores."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """Megatron's ``core_attention``: each position attends to itself and what is before it, or as it is told."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self._scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> Tensor:
        """
        Args:
            query: ``(sequence, batch, heads, head_dim)``.
            key, value: ``(sequence, batch, groups, head_dim)``.
            attention_mask: what each position attends to, bool ``(batch, 1, sequence, sequence)``; None for all before
                it.

        Returns:
            ``(sequence, batch, heads * head_dim)``.
        """
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self._scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return attended.permute(2, 0, 1, 3).flatten(2)
