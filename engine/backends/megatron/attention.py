"""Causal attention by PyTorch's own kernels, which need neither Transformer Engine nor the whole table of scores."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from .sequence_pieces import in_order


class CausalAttention(nn.Module):
    """Megatron's ``core_attention``: each position attends to itself and what is before it, or as it is told.

    Where process ranks share a sequence, keys and values of all of it are gathered, and backward sums their gradients
    (Llama Team, 2024, arXiv 2407.21783, section 3.3.2); each rank has an early and a late piece of the positions
    (:mod:`.sequence_pieces`), so that all have as much to do.
    """

    def __init__(
        self, config: Any, layer_number: int, pg_collection: Any, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__()
        self._ranks, self._scale = pg_collection.cp, softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> Tensor:
        """
        Args:
            query: ``(sequence, batch, heads, head_dim)``; as key and value, this rank's pieces of the sequence.
            key, value: ``(sequence, batch, groups, head_dim)``.
            attention_mask: what each position here attends to, bool ``(batch, 1, sequence, whole sequence)``; None for
                all before it.

        Returns:
            ``(sequence, batch, heads * head_dim)``.
        """
        ranks = self._ranks
        if ranks.size() > 1:
            key, value = _whole(key, value, ranks)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if attention_mask is not None or ranks.size() == 1:
            attended = self._attend(q, k, v, attention_mask, is_causal=attention_mask is None)
        else:
            attended = self._attend_by_piece(q, k, v)
        return attended.permute(2, 0, 1, 3).flatten(2)

    def _attend_by_piece(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rank, size, found = self._ranks.rank(), q.shape[2] // 2, []
        for part, piece in zip(q.split(size, dim=2), (rank, 2 * self._ranks.size() - 1 - rank), strict=True):
            end = (piece + 1) * size
            # Query i of the piece is position end - size + i. torch's own bias for that is not for dispatch modes.
            mask = torch.ones(size, end, dtype=torch.bool, device=q.device).tril(end - size)
            found.append(self._attend(part, k[:, :, :end], v[:, :, :end], mask))
        return torch.cat(found, dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool = False) -> Tensor:
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=self._scale, enable_gqa=is_grouped
        )


def _whole(key: Tensor, value: Tensor, ranks: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sequence, from those of all ranks' pieces."""
    both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=ranks)
    whole, size = in_order(both, ranks.size()), key.shape[-1]
    return whole[..., :size], whole[..., size:]
