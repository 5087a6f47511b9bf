"""A compact embedding that trains a subset of its rows, one for each token."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .compact import CompactWeight, compact_class
from .registry import register
from .selected_weight import SelectedWeight, write_selected_
from .unit import ProbeKind, Side


class _SelectedEmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        compact: Tensor,
        index: Tensor,
        start: int | None,
        folds_at_use: bool,
        padding: int | None,
        probe: Tensor | None,
        probe_kind: ProbeKind | None,
        omega: Tensor | None,
    ) -> Tensor:
        if folds_at_use:
            write_selected_(weight.data, compact.data, index, start, dim=0)
        rank = index.numel()
        # Where a token's gradient goes; to a row of its own, thrown away, if the token is not selected.
        slot = torch.full((weight.shape[0],), rank, device=index.device)
        slot[index] = torch.arange(rank, device=index.device)
        if padding is not None:
            slot[padding] = rank
        ctx.save_for_backward(slot[tokens].reshape(-1), tokens if probe is not None else None, omega)
        ctx.rank, ctx.compact_dtype, ctx.padding = rank, compact.dtype, padding
        ctx.probe_kind, ctx.num_rows = probe_kind, weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slots, tokens, omega = ctx.saved_tensors
        grad_y = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        # A token may come up many times: in bf16 the sum would lose most of them.
        grad_y = grad_y.to(torch.promote_types(grad_y.dtype, torch.float32))
        grad_compact = _sum_rows(grad_y, slots, ctx.rank + 1)[:-1].to(ctx.compact_dtype)
        grad_probe = None
        if tokens is not None:
            observed = grad_y @ omega.to(grad_y.dtype) if ctx.probe_kind == "rows" else grad_y
            grad_probe = _sum_rows(observed, tokens.reshape(-1), ctx.num_rows)
            if ctx.padding is not None:
                grad_probe[ctx.padding] = 0.0
        return None, None, grad_compact, *(None,) * 4, grad_probe, None, None


def _sum_rows(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return values.new_zeros(num_rows, values.shape[1]).index_add_(0, rows, values)


class SelectedEmbedding(SelectedWeight, CompactWeight, nn.Embedding):
    """A compact ``nn.Embedding`` whose ``compact`` holds the values of selected rows of ``weight``.

    Tokens of other rows get no gradient. The weight is ``(m, n)``: ``num_embeddings`` and ``embedding_dim``.
    """

    plain: ClassVar[type[nn.Module]] = nn.Embedding

    @classmethod
    def convert(
        cls, embedding: nn.Embedding, *, side: Side = "rows", index: Tensor, contiguous: bool, shared: None = None
    ) -> "SelectedEmbedding":
        """Turn ``embedding`` into a ``SelectedEmbedding`` in place; ``compact`` is left uninitialised.

        Args:
            side, shared: as in :meth:`.SelectedLinear.convert`; only rows are selected, and nothing is shared.
        """
        assert side == "rows"
        embedding.__class__ = compact_class(cls, type(embedding))
        assert isinstance(embedding, SelectedEmbedding)
        embedding._become_selected(side=side, index=index, contiguous=contiguous)
        return embedding

    def forward(self, input: Tensor) -> Tensor:
        self.begin_forward()
        return _SelectedEmbeddingFunction.apply(
            input,
            self.weight,
            self.compact,
            self.index,
            # A Python int would be a constant of the compiled graph and recompile it at every refresh.
            None if torch.compiler.is_compiling() else self.start,
            self.folds_at_use,
            self.padding_idx,
            self.probe,
            self.probe_kind if self.probe is not None else None,
            self.omega,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.index.numel()}"


register(nn.Embedding, selected=SelectedEmbedding.convert)
