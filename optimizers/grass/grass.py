"""Grass: AdamW on a rotating subset of each weight's columns or rows."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..compact.backend import SubspaceBackend
from ..compact.muon import MOMENTUM, Muon
from ..compact.optimizer import CompactOptimizer, Converted
from ..engine_optimizer import keywords_of
from ..layers.experts import StackedMatrices
from ..layers.registry import to_selected
from ..layers.shared_copy import SharedCopy
from ..layers.targets import find_targets
from ..layers.unit import CompactUnit
from ..layers.vocabulary import find_vocabulary
from ..numerics.seeds import derive_seed
from ..numerics.selection import SELECTION_RULES, select_index
from ..sharding.shards import LocalShards
from .interval import AdaptiveInterval
from .layers import SelectedTarget, convert_selected, ranks_of
from .moments import ADAM, carry_moments
from .norms import NormStatistics
from .options import GrassOptions
from .sharing import find_groups

# Where states that were saved by earlier versions have the decay that waits for the next refresh: in the group.
_OLD_DECAY = "pending_decay"


class Grass(CompactOptimizer[GrassOptions]):
    """AdamW that trains ``rank`` columns or rows of each chosen linear layer at a time.

    The layers are converted in place to :class:`SelectedLinear`; their full weight gradient is never formed, stored or
    reduced. Every ``refresh_interval`` steps all layers select new columns or rows together, and the compact
    parameters' moments and step count start again. All other parameters are plain AdamW. Works alone, under DDP, and
    through an engine under ZeRO.

    Source: Muhamed, Li, Woodruff, Diab, Smith (2024), "Grass: Compute Efficient Low-Memory LLM Training with
    Structured Sparse Gradients", arXiv 2406.17660: its ``P^T = rho B`` with ``rho = 1`` (for
    ``multinomial_replacement`` see :class:`~.unbiased.GrassUnbiased`, which then takes its place), and its reset of the
    moments at a refresh. It deviates from the paper in that

    * columns are offered beside rows and are the default, and ``uniform`` is the default selection;
    * selections by norm take effect one step after the gradient they are taken from, the first being uniform;
    * the norms are estimated, unless ``statistics`` says ``exact`` or ``local``.

    Args:
        model: not yet wrapped by DDP, FSDP or ``torch.compile``.
        options: the fields of :class:`~.options.GrassOptions`, as keywords.

    Raises:
        ValueError: an option out of range, a rank above a layer's selected dimension, globs that match nothing, or a
            model that is already wrapped.
    """

    type_name: ClassVar[str] = "Grass"
    options_type = GrassOptions

    @keywords_of(GrassOptions)
    def __init__(self, model: nn.Module, options: GrassOptions, backend: SubspaceBackend | None = None) -> None:
        self.rule = SELECTION_RULES[options.selection]
        self._statistics = NormStatistics(options.statistics, options.sketch_size)
        self._interval: AdaptiveInterval | None = None
        # By layer: the factor that the entries outside of the subspace are still to be scaled by.
        self._pending_decay: dict[str, float] = {}
        if options.adaptive_refresh is not None and options.refresh_interval is not None:
            longest = options.max_refresh_interval or 16 * options.refresh_interval
            self._interval = AdaptiveInterval(
                options.refresh_interval, threshold=options.adaptive_refresh, longest=longest
            )
        super().__init__(model, options, backend)

    @classmethod
    def carries_out(cls, options: GrassOptions) -> bool:
        return not options.repeats

    def _convert(self, model: nn.Module, options: GrassOptions) -> Converted:
        targets = self._targets(model, find_targets(model, options.target_modules), options)
        self._choice_of = {target.name: target.group for target in targets}
        ranks = ranks_of(
            targets, rank=options.rank, density=options.density, budget=options.budget, strata=options.strata
        )
        layers, full_rank = convert_selected(
            targets, ranks, self.rule, self._to_compact, seed=options.seed, strata=options.strata
        )
        self._local_shards = LocalShards(model)
        vocabulary = {target.name for target in targets if target.is_vocabulary}
        return Converted(layers, [name for name in full_rank if name not in vocabulary], vocabulary)

    def _targets(
        self, model: nn.Module, found: dict[str, nn.Linear | StackedMatrices], options: GrassOptions
    ) -> list[SelectedTarget]:
        group_of = {name: name for name in found}
        if options.side == "columns" and not options.repeats:
            linears = {name: target for name, target in found.items() if isinstance(target, nn.Module)}
            shared = find_groups(linears, options.shared_inputs)
            group_of |= {name: names[0] for names in shared for name in names}
        targets = [SelectedTarget(name, linear, options.side, group_of[name]) for name, linear in found.items()]
        if options.vocabulary == "rows":
            targets += [
                SelectedTarget(name, module, "rows", name, is_vocabulary=True)
                for name, module in find_vocabulary(model).items()
                if name not in found
            ]
        return targets

    def _to_compact(
        self, target: SelectedTarget, index: Tensor, contiguous: bool, shared: SharedCopy | None
    ) -> CompactUnit:
        return to_selected(target.module, side=target.side, index=index, contiguous=contiguous, shared=shared)

    def is_refresh_due(self) -> bool:
        return self._is_refreshed_after(self.num_steps)

    def _is_refreshed_after(self, step: int) -> bool:
        """Whether the subspace changes after the step of this number, the first being 1."""
        if self._interval is not None:
            return bool(self.layers) and step == self._interval.next_refresh
        return self._is_multiple_of_interval(step)

    def _observe_next_step(self) -> None:
        if self.rule.uses_norms and self._is_refreshed_after(self.num_steps + 1):
            self._statistics.start(self.layers, seed=derive_seed(self.options.seed, self.num_refreshes))

    def _fold(self, learning_rates: Sequence[float]) -> None:
        self.backend.fold(self.layers)
        if self.options.decay == "all":
            for layer, factor in zip(self.layers, self._decays(learning_rates), strict=True):
                self._pending_decay[layer.name] = self._pending_decay.get(layer.name, 1.0) * factor

    @torch.no_grad()
    def _change_subspace(self) -> None:
        """Select new columns or rows in every layer, and let the compact parameters' moments follow or start again."""
        old = [layer.module.selected().clone() for layer in self.layers]
        dims = [layer.module.num_choices for layer in self.layers]
        norms = self._norms()
        indices = [
            select_index(
                self.rule,
                dim,
                layer.module.rank,
                seed=self.options.seed,
                refresh=self.num_refreshes,
                name=self._choice_of[layer.name],
                norms=norms.get(self._choice_of[layer.name]),
                strata=self.options.strata,
            )
            for layer, dim in zip(self.layers, dims, strict=True)
        ]
        if self._interval is not None and self.layers:
            self._interval.observe(_similarity(old, indices, dims))
        self._take(indices, norms)
        if self.options.moments == "reset":
            self._reset_moments()
        else:
            self._carry_moments(old)

    def _take(self, indices: Sequence[Tensor], norms: dict[str, Tensor]) -> None:
        """Select these columns or rows."""
        decays = [self._decay_that_waits(layer.name) for layer in self.layers]
        self.backend.change_subspace(self.layers, indices, decays, seed=self.options.seed + self.num_refreshes)
        self._pending_decay = {}
        for group in self.param_groups:
            group.pop(_OLD_DECAY, None)

    def _decay_that_waits(self, name: str) -> float:
        of_group = self.param_groups[self._group_of[name]].get(_OLD_DECAY, 1.0)
        return self._pending_decay.get(name, 1.0) * of_group

    @torch.no_grad()
    def _settle(self) -> None:
        for layer in self.layers:
            module, decay = layer.module, self._decay_that_waits(layer.name)
            seed = derive_seed(self.options.seed + self.num_refreshes + 1, "decay", layer.name)
            if decay != 1.0:
                module.apply_(module.weight, module.compact, decay, seed=seed)

    def _carry_moments(self, old: Sequence[Tensor]) -> None:
        compact = [group for group in self.param_groups if group["kind"] == "compact"]
        carry_moments(
            self.layers,
            old,
            moments=(MOMENTUM,) if isinstance(self.base, Muon) else ADAM,
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
        own = {"side": self.options.side, "interval": adaptive, "pending_decay": dict(self._pending_decay)}
        return {**super().subspace_state(), **own}

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        super().load_subspace_state(state)
        self._pending_decay = dict(state.get("pending_decay", {}))
        if self._interval is not None:
            self._interval.load_state(state["interval"])
        for layer in self.layers:
            layer.module.drop_probe()
        self._observe_next_step()

    def _check_subspace_state(self, state: dict[str, Any]) -> None:
        if state.get("side", self.options.side) != self.options.side:
            raise ValueError(f"Grass state: expected side {self.options.side!r}, got {state['side']!r}")
        if self.rule.contiguous and self.options.strata == 1:
            for key, index in state.get("tensors", {}).items():
                if index.numel() > 1 and not bool((index.diff() == 1).all()):
                    raise ValueError(
                        f"Grass state: expected a block in {key}, got scattered entries: another selection saved it"
                    )
        if self._interval is not None and state.get("interval") is None:
            raise ValueError("Grass state: expected one with adaptive_refresh, got one without")
        super()._check_subspace_state(state)


def _similarity(old: Sequence[Tensor], new: Sequence[Tensor], dims: Sequence[int]) -> float:
    """How far the choices overlap above chance, the mean over the layers: 1 if they are equal, 0 if independent."""
    total = 0.0
    for before, after, dim in zip(old, new, dims, strict=True):
        before = before.cpu().unique()
        chance = before.numel() / dim
        total += (float(torch.isin(after, before).double().mean()) - chance) / (1.0 - chance)
    return total / len(old)
