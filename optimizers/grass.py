"""Grass: AdamW on a rotating subset of each weight's columns or rows."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from .backend import SubspaceBackend
from .bases import BaseName, check_base
from .compact import CompactOptimizer
from .compact_linear import CompactLinear, Side
from .conversion import CompactLayer, convert, find_targets, refuse_wrapped
from .selection import SELECTION_RULES, select_index

Decay = Literal["active", "all"]


class Grass(CompactOptimizer):
    """AdamW that trains ``rank`` columns or rows of each chosen linear layer at a time.

    The layers are converted in place to :class:`CompactLinear`; their full weight gradient is never formed, stored or
    reduced. Every ``refresh_interval`` steps all layers select new columns or rows together, and the compact
    parameters' moments and step count start again. All other parameters are plain AdamW. Works alone, under DDP, and
    through :func:`narrowgauge.engine.initialize` under DeepSpeed ZeRO.

    Source: Muhamed, Li, Woodruff, Diab, Smith (2024), "Grass: Compute Efficient Low-Memory LLM Training with
    Structured Sparse Gradients", arXiv 2406.17660: its ``P^T = rho B`` with ``rho = 1``, and its reset of the moments
    at a refresh. It deviates from the paper in that columns are offered beside rows and are the default, and in that
    selection is uniform or by block, without statistics of the gradient.

    Args:
        model: not yet wrapped by DDP, FSDP or ``torch.compile``.
        lr: learning rate of the dense parameters.
        rank: selected columns or rows per layer; give this or ``density``.
        density: selected share of the columns or rows, in (0, 1]. A layer whose rank is its whole dimension stays an
            ordinary layer and is trained at the compact parameters' rate; with density 1 this is ``torch.optim.AdamW``.
        side: ``columns`` (inputs; also shrinks what is kept for backward) or ``rows`` (outputs).
        selection: ``uniform`` or ``block`` (one contiguous block: slices instead of gathers).
        refresh_interval: optimizer steps between changes of subspace; None keeps the first one.
        betas, eps, weight_decay, foreach, fused: as in ``torch.optim.AdamW``.
        decay: ``active`` decays the selected entries. ``all`` also decays the others: their factor is accumulated and
            applied when the subspace changes, with stochastic rounding in bf16 (step by step it would round to
            nothing). Until then evaluation and checkpoints see them without it.
        matrix_lr_scale: learning rate of the compact parameters relative to ``lr``. Matrices usually want a 5 to 10
            times lower rate than embeddings and head.
        target_modules: globs over module names; default every linear inside the transformer blocks. Tied and frozen
            weights are left alone.
        param_groups: ``{"params": [globs over parameter names], **options}`` with ``lr``, ``betas``, ``eps`` or
            ``weight_decay``; the first match wins. Compact and dense members are kept in groups of their own.
        seed: of the selection; the same on all process ranks.
        base: the optimizer of all parameters: ``AdamW``, ``AdamW8bit`` (bitsandbytes, moments in 8 bits) or
            ``Adafactor``.
        backend: where the tensors live; given by ``narrowgauge.engine``.

    Raises:
        ValueError: an option out of range, a rank above a layer's selected dimension, globs that match nothing, or a
            model that is already wrapped.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        rank: int | None = None,
        density: float | None = None,
        side: Side = "columns",
        selection: str = "uniform",
        refresh_interval: int | None = 100,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        decay: Decay = "active",
        matrix_lr_scale: float = 1.0,
        target_modules: Sequence[str] | None = None,
        param_groups: Sequence[dict[str, Any]] = (),
        seed: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
        base: BaseName = "AdamW",
        backend: SubspaceBackend | None = None,
    ) -> None:
        self.check_options(
            rank=rank,
            density=density,
            side=side,
            selection=selection,
            refresh_interval=refresh_interval,
            decay=decay,
            matrix_lr_scale=matrix_lr_scale,
            base=base,
            foreach=foreach,
            fused=fused,
        )
        refuse_wrapped(model)
        if backend is None and any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError("the model was built under deepspeed.zero.Init: use narrowgauge.engine.initialize")
        targets = find_targets(model, target_modules)
        self.rule = SELECTION_RULES[selection]
        self.decay = decay
        self.side = side
        layers, full_rank = convert(targets, rank=rank, density=density, side=side, rule=self.rule, seed=seed)
        super().__init__(
            model,
            layers,
            full_rank,
            base=base,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            refresh_interval=refresh_interval,
            matrix_lr_scale=matrix_lr_scale,
            param_groups=param_groups,
            seed=seed,
            foreach=foreach,
            fused=fused,
            backend=backend,
        )

    @staticmethod
    def check_options(
        *,
        rank: int | None,
        density: float | None,
        side: str,
        selection: str,
        refresh_interval: int | None,
        decay: str,
        matrix_lr_scale: float,
        base: str = "AdamW",
        foreach: bool | None = None,
        fused: bool | None = None,
        **_: Any,
    ) -> None:
        """Check the options that need no model.

        Raises:
            ValueError: naming the option, what was found and what is allowed.
        """
        if (rank is None) == (density is None):
            raise ValueError(f"give exactly one of rank and density; found rank={rank}, density={density}")
        if rank is not None and not (_is_integer(rank) and rank >= 1):
            raise ValueError(f"rank: {rank} found, an integer of at least 1 is needed")
        if density is not None and not (_is_number(density) and 0.0 < density <= 1.0):
            raise ValueError(f"density: {density} found, a number in (0, 1] is needed")
        if side not in ("columns", "rows"):
            raise ValueError(f"side: {side!r} found, 'columns' or 'rows' is needed")
        if selection not in SELECTION_RULES:
            raise ValueError(f"selection: {selection!r} found, one of {sorted(SELECTION_RULES)} is needed")
        if not (_is_number(matrix_lr_scale) and matrix_lr_scale > 0.0):
            raise ValueError(f"matrix_lr_scale: {matrix_lr_scale} found, a number above 0 is needed")
        if refresh_interval is not None and not (_is_integer(refresh_interval) and refresh_interval >= 1):
            raise ValueError(f"refresh_interval: {refresh_interval} found, an integer of at least 1 or null is needed")
        if decay not in ("active", "all"):
            raise ValueError(f"decay: {decay!r} found, 'active' or 'all' is needed")
        if decay == "all" and refresh_interval is None:
            raise ValueError("decay: 'all' found, but it takes effect at a refresh, and refresh_interval is None")
        check_base(base, foreach=foreach, fused=fused)

    def _fold(self, learning_rates: Sequence[float]) -> None:
        super()._fold(learning_rates)
        if self.decay == "all":
            for group, lr in zip(self.param_groups, learning_rates, strict=True):
                if group["kind"] == "compact":
                    group["pending_decay"] *= 1.0 - float(lr) * group["weight_decay"]

    def _change_subspace(self) -> None:
        """Select new columns or rows in every layer and start the compact parameters' moments again."""
        indices = [
            select_index(
                self.rule,
                layer.module.weight_shape[layer.module.dim],
                layer.module.index.numel(),
                seed=self.seed,
                refresh=self.num_refreshes,
                name=layer.name,
            )
            for layer in self.layers
        ]
        decays = [self.param_groups[self._group_of[layer.name]]["pending_decay"] for layer in self.layers]
        self.backend.change_subspace(self.layers, indices, decays, seed=self.seed + self.num_refreshes)
        for group in self.param_groups:
            if group["kind"] == "compact":
                group["pending_decay"] = 1.0
        self._reset_moments()

    def subspace_state(self) -> dict[str, Any]:
        return {**super().subspace_state(), "side": self.side}

    def _check_subspace_state(self, state: dict[str, Any]) -> None:
        if state.get("side", self.side) != self.side:
            raise ValueError(f"Grass state: it was saved with {state['side']}, this optimizer has {self.side}")
        super()._check_subspace_state(state)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


__all__ = ["CompactLayer", "CompactLinear", "Grass"]
