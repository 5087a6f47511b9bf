"""Grass: AdamW on a rotating subset of each weight's columns or rows."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..compact.backend import SubspaceBackend
from ..compact.inner import BaseName, check_base
from ..compact.optimizer import CompactOptimizer
from ..layers.compact import Side
from ..layers.targets import find_targets
from ..layers.vocabulary import find_vocabulary
from ..layers.wrappers import refuse_wrapped
from ..numerics.seeds import derive_seed
from ..numerics.selection import SELECTION_RULES, replacement_scales, select_index
from ..options import check_adam, check_choice, check_count, check_one_given, check_share
from ..sharding.shards import LocalShards
from .interval import AdaptiveInterval
from .layers import SelectedTarget, convert_selected, ranks_of
from .moments import carry_moments
from .norms import NormStatistics, Statistics
from .sharing import SharedInputs, find_groups

Selection = Literal["uniform", "block", "top", "multinomial", "multinomial_replacement"]
Decay = Literal["active", "all"]
Moments = Literal["reset", "carry"]
Vocabulary = Literal["dense", "rows"]


class Grass(CompactOptimizer):
    """AdamW that trains ``rank`` columns or rows of each chosen linear layer at a time.

    The layers are converted in place to :class:`SelectedLinear`; their full weight gradient is never formed, stored or
    reduced. Every ``refresh_interval`` steps all layers select new columns or rows together, and the compact
    parameters' moments and step count start again. All other parameters are plain AdamW. Works alone, under DDP, and
    through an engine under ZeRO.

    Source: Muhamed, Li, Woodruff, Diab, Smith (2024), "Grass: Compute Efficient Low-Memory LLM Training with
    Structured Sparse Gradients", arXiv 2406.17660: its ``P^T = rho B``, with ``rho = 1`` and, for
    ``multinomial_replacement``, ``rho_jj = 1 / sqrt(r q_j)``; and its reset of the moments at a refresh. It deviates
    from the paper in that

    * columns are offered beside rows and are the default, and ``uniform`` is the default selection;
    * selections by norm take effect one step after the gradient they are taken from, the first being uniform;
    * the norms are estimated, unless ``statistics`` says ``exact`` or ``local``.

    Args:
        model: not yet wrapped by DDP, FSDP or ``torch.compile``.
        lr: learning rate of the dense parameters.
        rank: selected columns or rows per layer; give this, ``density`` or ``budget``.
        density: selected share of the columns or rows, in (0, 1]. A layer whose rank is its whole dimension stays an
            ordinary layer and is trained at the compact parameters' rate; with density 1 this is ``torch.optim.AdamW``.
        budget: elements of all compact parameters together; the density follows, and is equal in all layers up to one
            column or row.
        side: ``columns`` (inputs; also shrinks what is kept for backward) or ``rows`` (outputs).
        selection: ``uniform``; ``block`` (one contiguous block: slices instead of gathers); by the norms of the
            gradient's columns or rows: ``top`` (the largest), ``multinomial`` (drawn without replacement, with
            probabilities proportional to the norms), ``multinomial_replacement`` (drawn independently, so with repeats,
            and scaled: the projected gradient, lifted back, has the full one as its expectation).
        statistics: where the norms come from, once per refresh. ``sketch``: ``sketch_size`` random projections of the
            averaged gradient, ``m * sketch_size`` numbers reduced per layer (columns: ``n *``), with all of the input
            kept for backward at that step. ``exact``: the averaged gradient itself, formed and reduced at that step.
            ``local``: the first process rank's gradient, formed there and not reduced.
        sketch_size: the relative error of a norm is about ``1 / sqrt(2 * sketch_size)``.
        shared_inputs: layers that share an input share the choice of columns, and keep one copy of them for backward,
            which saves memory and costs about 1 % of loss (``benchmarks/quality.py``). ``siblings`` finds them by their
            names (q, k and v; gate and up) where it applies; a list of lists of globs over module names says which
            siblings; None shares nothing. Not for rows or ``multinomial_replacement``.
        refresh_interval: optimizer steps between changes of subspace; None keeps the first one.
        adaptive_refresh: a threshold in (0, 1], for selections by norms: the interval doubles whenever the
            choices of the last five refreshes overlapped this much, on average and above chance (0.4 in Q-GaLore, see
            :class:`~.adaptive_interval.AdaptiveInterval`).
        max_refresh_interval: the longest it becomes; default 16 times ``refresh_interval``.
        moments: at a refresh, ``reset`` as the paper, or ``carry``: entries that stay keep m and v, new ones get m = 0
            and the mean v of the layer's kept ones, and the step count goes on.
        betas, eps, weight_decay, foreach, fused: as in ``torch.optim.AdamW``.
        decay: ``active`` decays the selected entries. ``all`` also decays the others: their factor is accumulated and
            applied when the subspace changes, with stochastic rounding in bf16 (step by step it would round to
            nothing). Until then evaluation and checkpoints see them without it. None is ``active``; with
            ``multinomial_replacement`` it is ``all``, there applied at each step, and the only one allowed.
        matrix_lr_scale: learning rate of the compact parameters relative to ``lr``. Matrices usually want a 5 to 10
            times lower rate than embeddings and head.
        vocabulary: ``rows`` also selects rows, that is tokens, of the LM head and the embedding, with the same density
            (for ``rank``: ``rank / n``) and by the same rule; they are trained at ``lr``. Tied ones stay dense. Not
            with ``multinomial_replacement``.
        target_modules: globs over module names; default every linear inside the transformer blocks. Tied and frozen
            weights are left alone.
        param_groups: ``{"params": [globs over parameter names], **options}`` with ``lr``, ``betas``, ``eps`` or
            ``weight_decay``; the first match wins. Compact and dense members are kept in groups of their own.
        seed: of the selection; the same on all process ranks.
        base: the optimizer of all parameters: ``AdamW``, ``AdamW8bit`` (bitsandbytes, moments in 8 bits) or
            ``Adafactor``.
        backend: where the tensors live; given by an engine.

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
        budget: int | None = None,
        side: Side = "columns",
        selection: Selection = "uniform",
        statistics: Statistics = "sketch",
        sketch_size: int = 32,
        shared_inputs: SharedInputs = None,
        refresh_interval: int | None = 100,
        adaptive_refresh: float | None = None,
        max_refresh_interval: int | None = None,
        moments: Moments = "reset",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        decay: Decay | None = None,
        matrix_lr_scale: float = 1.0,
        vocabulary: Vocabulary = "dense",
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
            budget=budget,
            side=side,
            selection=selection,
            statistics=statistics,
            sketch_size=sketch_size,
            shared_inputs=shared_inputs,
            refresh_interval=refresh_interval,
            adaptive_refresh=adaptive_refresh,
            max_refresh_interval=max_refresh_interval,
            moments=moments,
            decay=decay,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            matrix_lr_scale=matrix_lr_scale,
            vocabulary=vocabulary,
            base=base,
            foreach=foreach,
            fused=fused,
        )
        refuse_wrapped(model, in_engine=backend is not None)
        self.rule = SELECTION_RULES[selection]
        self.side, self.moments = side, moments
        self.decay: Decay = decay or ("all" if self.rule.repeats else "active")
        self.statistics: Statistics = statistics
        self._statistics = NormStatistics(statistics, sketch_size)
        self._interval: AdaptiveInterval | None = None
        if adaptive_refresh is not None and refresh_interval is not None:
            longest = max_refresh_interval or 16 * refresh_interval
            self._interval = AdaptiveInterval(refresh_interval, threshold=adaptive_refresh, longest=longest)
        targets = _selected_targets(
            model,
            find_targets(model, target_modules),
            side=side,
            shared_inputs=shared_inputs,
            vocabulary=vocabulary,
            repeats=self.rule.repeats,
        )
        ranks = ranks_of(targets, rank=rank, density=density, budget=budget)
        layers, full_rank = convert_selected(targets, ranks, self.rule, seed=seed)
        vocabulary_layers = {target.name for target in targets if target.is_vocabulary}
        self._choice_of = {target.name: target.group for target in targets}
        self._local_shards = LocalShards(model)
        super().__init__(
            model,
            layers,
            [name for name in full_rank if name not in vocabulary_layers],
            dense_rate=vocabulary_layers,
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
    def check_options(**options: Any) -> None:
        """Check the options that need no model.

        Raises:
            ValueError: naming the option, what was found and what is allowed.
        """
        check_one_given(options, ("rank", "density", "budget"))
        check_count(options, "rank", optional=True)
        check_count(options, "budget", optional=True)
        check_share(options, "density")
        for key, allowed in _CHOICES.items():
            check_choice(options, key, allowed)
        check_count(options, "sketch_size")
        check_adam(options)
        check_count(options, "refresh_interval", optional=True)
        _check_refresh(options)
        _check_sharing(options)
        if options["vocabulary"] == "rows" and options["selection"] == "multinomial_replacement":
            raise ValueError("vocabulary: 'rows' found, a selection without replacement is needed")
        if options["moments"] == "carry":
            for key, unfit in (("selection", "multinomial_replacement"), ("base", "AdamW8bit"), ("base", "Adafactor")):
                if options[key] == unfit:
                    raise ValueError(f"moments: 'carry' found, which {key} {unfit!r} does not have")
        if options["base"] == "Adafactor" and options["selection"] == "multinomial_replacement":
            raise ValueError("base: 'Adafactor' found, a selection without replacement is needed with it")
        check_base(options["base"], foreach=options["foreach"], fused=options["fused"])

    def is_refresh_due(self) -> bool:
        return self._is_refreshed_after(self.num_steps)

    def _is_refreshed_after(self, step: int) -> bool:
        """Whether the subspace changes after the step of this number, the first being 1."""
        if self.refresh_interval is None or not self.layers:
            return False
        if self._interval is not None:
            return step == self._interval.next_refresh
        return step % self.refresh_interval == 0

    def _observe_next_step(self) -> None:
        if self.rule.uses_norms and self._is_refreshed_after(self.num_steps + 1):
            self._statistics.start(self.layers, seed=derive_seed(self.seed, self.num_refreshes))

    def _fold(self, learning_rates: Sequence[float]) -> None:
        if self.rule.repeats:
            decays = self._decays(learning_rates)
            self.backend.add_changes(self.layers, decays, seed=derive_seed(self.seed, "step", self.num_steps))
            return
        self.backend.fold(self.layers)
        if self.decay == "all":
            for group, lr in zip(self.param_groups, learning_rates, strict=True):
                if group["kind"] == "compact":
                    group["pending_decay"] *= 1.0 - float(lr) * group["weight_decay"]

    @torch.no_grad()
    def _change_subspace(self) -> None:
        """Select new columns or rows in every layer, and let the compact parameters' moments follow or start again."""
        old = [layer.module.selected().clone() for layer in self.layers]
        dims = [layer.module.weight_shape[layer.module.dim] for layer in self.layers]
        norms = self._norms()
        indices = [
            select_index(
                self.rule,
                dim,
                layer.module.rank,
                seed=self.seed,
                refresh=self.num_refreshes,
                name=self._choice_of[layer.name],
                norms=norms.get(self._choice_of[layer.name]),
            )
            for layer, dim in zip(self.layers, dims, strict=True)
        ]
        if self._interval is not None and self.layers:
            self._interval.observe(_similarity(old, indices, dims))
        if self.rule.repeats:
            for layer, index in zip(self.layers, indices, strict=True):
                scales = replacement_scales(norms[self._choice_of[layer.name]], index)
                key = "right" if layer.module.side == "columns" else "left"
                layer.module.set_subspace({key: scales, f"{key}_index": index})
        else:
            decays = [self.param_groups[self._group_of[layer.name]]["pending_decay"] for layer in self.layers]
            self.backend.change_subspace(self.layers, indices, decays, seed=self.seed + self.num_refreshes)
        for group in self.param_groups:
            if group["kind"] == "compact":
                group["pending_decay"] = 1.0
        if self.moments == "reset":
            self._reset_moments()
            return
        compact = [group for group in self.param_groups if group["kind"] == "compact"]
        carry_moments(
            self.layers,
            old,
            flats=[flat for group in compact for flat in self.backend.state_tensors(group)],
            state=self.state,
            shards=self.backend.shards() or self._local_shards,
        )

    def _norms(self) -> dict[str, Tensor]:
        """The norms to choose by, one vector for each choice; empty where the rule needs none."""
        if not self.rule.uses_norms:
            return {}
        squares: dict[str, Tensor] = {}
        for layer, own in zip(self.layers, self._statistics.finish(self.layers, self.backend), strict=True):
            name = self._choice_of[layer.name]
            squares[name] = squares[name] + own if name in squares else own
        return {name: own.sqrt() for name, own in squares.items()}

    def subspace_state(self) -> dict[str, Any]:
        adaptive = self._interval.state() if self._interval is not None else None
        return {**super().subspace_state(), "side": self.side, "interval": adaptive}

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        super().load_subspace_state(state)
        if self._interval is not None:
            self._interval.load_state(state["interval"])
        for layer in self.layers:
            layer.module.drop_probe()
        self._observe_next_step()

    def _check_subspace_state(self, state: dict[str, Any]) -> None:
        if state.get("side", self.side) != self.side:
            raise ValueError(f"Grass state: it was saved with {state['side']}, this optimizer has {self.side}")
        if self.rule.contiguous:
            for key, index in state.get("tensors", {}).items():
                if index.numel() > 1 and not bool((index.diff() == 1).all()):
                    raise ValueError(f"Grass state: {key} was saved by another selection, its entries are no block")
        if self._interval is not None and state.get("interval") is None:
            raise ValueError("Grass state: it was saved without adaptive_refresh, this optimizer has it")
        super()._check_subspace_state(state)


_CHOICES = {
    "side": get_args(Side),
    "selection": get_args(Selection),
    "statistics": get_args(Statistics),
    "moments": get_args(Moments),
    "decay": (None, *get_args(Decay)),
    "vocabulary": get_args(Vocabulary),
}


def _check_refresh(options: dict[str, Any]) -> None:
    selection, interval, longest = (options[key] for key in ("selection", "refresh_interval", "max_refresh_interval"))
    repeats = selection == "multinomial_replacement"
    if options["decay"] == "all" and interval is None and not repeats:
        raise ValueError("decay: 'all' found, but it takes effect at a refresh, and refresh_interval is None")
    if options["decay"] == "active" and repeats:
        raise ValueError(f"decay: 'active' found, 'all' is needed with selection {selection!r}")
    check_count(options, "max_refresh_interval", optional=True)
    check_share(options, "adaptive_refresh")
    if options["adaptive_refresh"] is None:
        if longest is not None:
            raise ValueError(f"max_refresh_interval: {longest} found, but adaptive_refresh is None")
        return
    if interval is None or not SELECTION_RULES[selection].uses_norms:
        raise ValueError(
            f"adaptive_refresh: {options['adaptive_refresh']} found, a refresh_interval and a selection by norms are"
            f" needed; found {interval} and {selection!r}"
        )
    if longest is not None and longest < interval:
        raise ValueError(f"max_refresh_interval: {longest} found, at least refresh_interval, {interval}, is needed")


def _check_sharing(options: dict[str, Any]) -> None:
    shared = options["shared_inputs"]
    if shared is None or shared == "siblings":
        return
    lists = isinstance(shared, list) and all(isinstance(globs, list) and globs for globs in shared)
    if not lists or not all(isinstance(glob, str) for globs in shared for glob in globs):
        raise ValueError(f"shared_inputs: {shared!r} found, 'siblings', None or a list of lists of globs is needed")
    if options["side"] == "rows" or options["selection"] == "multinomial_replacement":
        raise ValueError(
            f"shared_inputs: {shared!r} found with side {options['side']!r} and selection {options['selection']!r}:"
            " only columns without repeats can be shared"
        )


def _selected_targets(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    *,
    side: Side,
    shared_inputs: SharedInputs,
    vocabulary: Vocabulary,
    repeats: bool,
) -> list[SelectedTarget]:
    group_of = {name: name for name in linears}
    if side == "columns" and not repeats:
        group_of |= {name: names[0] for names in find_groups(linears, shared_inputs) for name in names}
    targets = [SelectedTarget(name, linear, side, group_of[name]) for name, linear in linears.items()]
    if vocabulary == "rows":
        targets += [
            SelectedTarget(name, module, "rows", name, is_vocabulary=True)
            for name, module in find_vocabulary(model).items()
            if name not in linears
        ]
    return targets


def _similarity(old: Sequence[Tensor], new: Sequence[Tensor], dims: Sequence[int]) -> float:
    """How far the choices overlap above chance, the mean over the layers: 1 if they are equal, 0 if independent."""
    total = 0.0
    for before, after, dim in zip(old, new, dims, strict=True):
        before = before.cpu().unique()
        chance = before.numel() / dim
        total += (float(torch.isin(after, before).double().mean()) - chance) / (1.0 - chance)
    return total / len(old)
