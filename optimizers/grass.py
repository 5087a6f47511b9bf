"""Grass: AdamW on a rotating subset of each weight's columns or rows."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from .backend import LocalBackend, SubspaceBackend
from .compact_linear import CompactLinear, Side
from .conversion import CompactLayer, convert, find_targets, refuse_wrapped
from .groups import build_groups
from .selection import SELECTION_RULES, select_index

Decay = Literal["active", "all"]
STATE_VERSION = 1


class Grass(torch.optim.AdamW):
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
        compact_lr_scale: learning rate of the compact parameters relative to ``lr``. Matrices usually want a 5 to 10
            times lower rate than embeddings and head.
        target_modules: globs over module names; default every linear inside the transformer blocks. Tied and frozen
            weights are left alone.
        param_groups: ``{"params": [globs over parameter names], **options}`` with ``lr``, ``betas``, ``eps`` or
            ``weight_decay``; the first match wins. Compact and dense members are kept in groups of their own.
        seed: of the selection; the same on all process ranks.
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
        compact_lr_scale: float = 1.0,
        target_modules: Sequence[str] | None = None,
        param_groups: Sequence[dict[str, Any]] = (),
        seed: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
        backend: SubspaceBackend | None = None,
    ) -> None:
        check_options(
            rank=rank,
            density=density,
            side=side,
            selection=selection,
            refresh_interval=refresh_interval,
            decay=decay,
            compact_lr_scale=compact_lr_scale,
        )
        refuse_wrapped(model)
        if backend is None and any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError("the model was built under deepspeed.zero.Init: use narrowgauge.engine.initialize")
        targets = find_targets(model, target_modules)
        self.rule = SELECTION_RULES[selection]
        self.layers, full_rank = convert(targets, rank=rank, density=density, side=side, rule=self.rule, seed=seed)
        self.backend: SubspaceBackend = backend or LocalBackend()
        self.refresh_interval = refresh_interval
        self.decay = decay
        self.seed = seed
        self.num_steps = 0
        self.num_refreshes = 0
        try:
            self._fill_compact()
            groups = build_groups(model, self.layers, full_rank, param_groups, lr=lr, compact_lr_scale=compact_lr_scale)
            super().__init__(
                groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach, fused=fused
            )
        except Exception:
            for layer in self.layers:
                layer.module.revert()
            raise
        owner = {id(layer.module.compact): layer.name for layer in self.layers}
        # By position: engines replace the parameters of the groups, and loading a state replaces the groups.
        self._group_of = {owner[id(p)]: i for i, g in enumerate(groups) for p in g["params"] if id(p) in owner}
        self._step_hook = self.register_step_post_hook(Grass._after_own_step)

    def _fill_compact(self) -> None:
        for layer in self.layers:
            with self.backend.gathered(layer), torch.no_grad():
                layer.module.compact.copy_(layer.module.read(layer.module.weight))

    def __getstate__(self) -> dict[str, Any]:
        """Copying and pickling are refused: the copy would keep the original model's layers, or none."""
        raise TypeError("Grass holds its model's layers and cannot be copied or pickled: use state_dict()")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As AdamW's; the added parameters are dense ones."""
        super().add_param_group({"kind": "dense", **param_group})

    def defer_to_engine(self, backend: SubspaceBackend) -> None:
        """Hand fold and refresh to an engine that will call :meth:`after_step` itself, once per optimizer step."""
        self._step_hook.remove()
        self.backend = backend

    def _after_own_step(self, args: Any, kwargs: Any) -> None:
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(m.compact) not in owned or m.compact.dim() != 2 for m in (layer.module for layer in self.layers)):
            raise RuntimeError(
                "another library replaced Grass's parameters (DeepSpeed ZeRO and FSDP do): under DeepSpeed use"
                " narrowgauge.engine.initialize; FSDP is not supported"
            )
        self.after_step(self.learning_rates())

    def learning_rates(self) -> list[float]:
        """The current learning rate of each parameter group."""
        return [group["lr"] for group in self.param_groups]

    def after_step(self, learning_rates: Sequence[float]) -> None:
        """Fold the compact values into the weights, count the step, and refresh when it is due.

        Args:
            learning_rates: those the step was taken with (a scheduler may have moved on since).
        """
        self.backend.fold(self.layers)
        self.num_steps += 1
        if self.decay == "all":
            for group, lr in zip(self.param_groups, learning_rates, strict=True):
                if group["kind"] == "compact":
                    group["pending_decay"] *= 1.0 - float(lr) * group["weight_decay"]
        if self.refresh_interval is not None and self.layers and self.num_steps % self.refresh_interval == 0:
            self.refresh()

    def refresh(self) -> None:
        """Select new columns or rows in every layer and start the compact parameters' moments again."""
        self.num_refreshes += 1
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
                for tensor in self.backend.state_tensors(group):
                    _reset_moments(self.state.get(tensor, {}))

    def subspace_state(self) -> dict[str, Any]:
        """Counters and indices; with the parameters, moments and groups, all that a resume needs."""
        return {
            "version": STATE_VERSION,
            "num_steps": self.num_steps,
            "num_refreshes": self.num_refreshes,
            "side": self.layers[0].module.side if self.layers else None,
            "index": {layer.name: layer.module.index.cpu() for layer in self.layers},
        }

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`subspace_state`; the compact values are the caller's to restore.

        Raises:
            ValueError: it was saved by another version, side, set of layers or ranks; nothing has changed then.
        """
        self._check_subspace_state(state)
        for layer in self.layers:
            layer.module.set_index(state["index"][layer.name])
        self.num_steps, self.num_refreshes = state["num_steps"], state["num_refreshes"]

    def _check_subspace_state(self, state: dict[str, Any]) -> None:
        if state["version"] != STATE_VERSION:
            raise ValueError(f"Grass state: version {state['version']} found, {STATE_VERSION} expected")
        saved, own = state["index"], {layer.name: layer.module for layer in self.layers}
        if set(saved) != set(own):
            odd = sorted(set(saved) ^ set(own))
            raise ValueError(f"Grass state: its compact layers differ from this model's, for example {odd[:4]}")
        for name, module in own.items():
            if saved[name].shape != module.index.shape or state["side"] != module.side:
                raise ValueError(
                    f"Grass state: {name} was saved with {saved[name].numel()} {state['side']},"
                    f" this optimizer has {module.index.numel()} {module.side}"
                )

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state and, under ``subspace``, the indices, counters and compact values."""
        compact = {layer.name: layer.module.compact.detach() for layer in self.layers}
        return {**super().state_dict(), "subspace": {**self.subspace_state(), "compact": compact}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict`, in either order with the model's; the weights are folded afterwards.

        Raises:
            ValueError: it is not a Grass state, or belongs to another configuration; nothing has changed then.
        """
        if "subspace" not in state_dict:
            raise ValueError("not a state of Grass: it has no 'subspace'")
        subspace = state_dict["subspace"]
        self._check_subspace_state(subspace)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "subspace"})
        self.load_subspace_state(subspace)
        for layer in self.layers:
            layer.module.compact.copy_(subspace["compact"][layer.name])
        self.backend.fold(self.layers)


def _reset_moments(state: dict[str, Any]) -> None:
    """Forget m, v and the step count: were the count kept, bias correction would make the next updates too large."""
    for key in ("exp_avg", "exp_avg_sq", "step"):
        if key in state:
            state[key].zero_()


def check_options(
    *,
    rank: int | None,
    density: float | None,
    side: str,
    selection: str,
    refresh_interval: int | None,
    decay: str,
    compact_lr_scale: float,
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
    if not (_is_number(compact_lr_scale) and compact_lr_scale > 0.0):
        raise ValueError(f"compact_lr_scale: {compact_lr_scale} found, a number above 0 is needed")
    if refresh_interval is not None and not (_is_integer(refresh_interval) and refresh_interval >= 1):
        raise ValueError(f"refresh_interval: {refresh_interval} found, an integer of at least 1 or null is needed")
    if decay not in ("active", "all"):
        raise ValueError(f"decay: {decay!r} found, 'active' or 'all' is needed")
    if decay == "all" and refresh_interval is None:
        raise ValueError("decay: 'all' found, but it takes effect at a refresh, and refresh_interval is None")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


__all__ = ["CompactLayer", "CompactLinear", "Grass"]
