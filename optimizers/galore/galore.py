"""GaLore: a base optimizer on gradients projected into a low-rank subspace."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..compact.backend import SubspaceBackend
from ..compact.optimizer import CompactOptimizer, Converted
from ..compact.sketches import directions
from ..engine_optimizer import keywords_of
from ..layers.experts import StackedMatrices
from ..layers.registry import outputs_and_inputs, to_projected
from ..layers.targets import CompactLayer, find_targets, rank_of
from ..numerics.seeds import derive_seed
from .bases import aligned, iterated_basis, leading_basis, random_basis
from .options import GaLoreOptions


class GaLore(CompactOptimizer[GaLoreOptions]):
    """A base optimizer on projected gradients: ``R = A^T G``, ``G B`` or ``A^T G B`` with orthonormal ``A`` and ``B``.

    The layers are converted in place to :class:`~.projected_linear.ProjectedLinear`: backward gives ``R`` and never
    forms ``G``, so ``R`` is what is stored, reduced between ranks and clipped. After each step the change
    ``scale * A C B^T`` is added to the weights; in bf16 with stochastic rounding, so that changes far below a weight's
    precision are kept on average. Decay is of the whole weight.

    Every ``refresh_interval`` steps the bases follow the gradient. Its range is taken from step t, averaged over
    micro-batches and process ranks, and used from step t + 1 on: at the first step the bases are random, and the
    moments of that step are forgotten. Singular vectors have no sign of their own: each takes the one that agrees with
    the vector whose moments it inherits. The bases are whole on every rank.

    Source: Zhao, Zhang, Chen, Wang, Anandkumar, Tian (2024), "GaLore: Memory-Efficient LLM Training by Gradient
    Low-Rank Projection", arXiv 2403.03507, Algorithm 2. It deviates from the paper in the lag of one step and, with
    ``projector="sketch"`` (randomised range finder) or ``"power"`` (one subspace iteration from the present basis), in
    how the singular vectors are found. :class:`~.reference.GaLoreReference` takes its place with
    ``reference_compatible``.

    Args:
        model: not yet wrapped by DDP, FSDP or ``torch.compile``.
        options: the fields of :class:`~.options.GaLoreOptions`, as keywords.

    Raises:
        ValueError: an option out of range, a rank above a layer's smaller dimension, globs that match nothing, or a
            model that is already wrapped.
    """

    type_name: ClassVar[str] = "GaLore"
    folds_to_zero: ClassVar[bool] = True
    options_type = GaLoreOptions

    @keywords_of(GaLoreOptions)
    def __init__(self, model: nn.Module, options: GaLoreOptions, backend: SubspaceBackend | None = None) -> None:
        super().__init__(model, options, backend)

    @classmethod
    def carries_out(cls, options: GaLoreOptions) -> bool:
        return not options.reference_compatible

    def _convert(self, model: nn.Module, options: GaLoreOptions) -> Converted:
        return _convert(find_targets(model, options.target_modules), options)

    def is_refresh_due(self) -> bool:
        """Whether the step just counted is one whose gradient gives the next bases: 1, 1 + refresh_interval, ..."""
        return self._is_multiple_of_interval(self.num_steps - 1)

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        super().load_subspace_state(state)
        self._observe_next_step()

    def _observe_next_step(self) -> None:
        """Observe the full gradients of the coming step if the next bases are taken from them, else none."""
        is_observed = self._is_multiple_of_interval(self.num_steps)
        for layer in self.layers:
            if not is_observed:
                layer.module.drop_probe()
            elif self.options.projector == "sketch":
                side, seed = layer.module.side, derive_seed(self.options.seed, self.num_refreshes)
                m, n = layer.module.weight_shape
                size = min(layer.module.rank + self.options.oversampling, m // layer.module.num_matrices, n)
                omega = directions(layer, side=side, size=size, seed=seed, of_each=True)
                layer.module.start_probe(side, omega)
            else:
                layer.module.start_probe("full")

    @torch.no_grad()
    def _fold(self, learning_rates: Sequence[float]) -> None:
        decays = self._decays(learning_rates)
        if self.options.base == "Adafactor":
            self._scale_to_weights()
        seed = derive_seed(self.options.seed, "step", self.num_steps)
        self.backend.add_changes(self.layers, decays, seed=seed)

    def _scale_to_weights(self) -> None:
        """Make Adafactor's steps relative to the size of the weights: it has seen changes, that begin at zero."""
        for layer in self.layers:
            module = layer.module
            floor = self.param_groups[self._group_of[layer.name]]["eps"][1]
            dtype = torch.promote_types(module.weight.dtype, torch.float32)
            rms = torch.linalg.vector_norm(module.weight, dtype=dtype) / math.sqrt(module.weight.numel())
            module.compact.mul_(max(1.0, float(rms) / floor))

    def refresh(self) -> None:
        """Change the subspace of every layer, after a step that was observed (see :meth:`is_refresh_due`).

        Raises:
            RuntimeError: it was not.
        """
        if any(layer.module.probe is None for layer in self.layers):
            raise RuntimeError("GaLore.refresh: the last step's gradient was not observed, so there are no new bases")
        super().refresh()

    @torch.no_grad()
    def _change_subspace(self) -> None:
        for layer, statistic in zip(self.layers, self._observed(), strict=True):
            self._set_bases(layer, statistic)
        if self.options.moments == "reset" or self.num_refreshes == 1:
            self._reset_moments()

    def _observed(self) -> list[Tensor]:
        return [self.backend.communicator(layer.name).average_(layer.module.end_probe()) for layer in self.layers]

    def _set_bases(self, layer: CompactLayer, statistic: Tensor) -> None:
        module, found = layer.module, {}
        for key, basis in module.subspace().items():
            found[key] = self._following(statistic, basis, of_rows=key == "left").to(basis.dtype)
        # One rank's are everybody's: where singular values are nearly equal, rounding decides.
        for basis in found.values():
            self.backend.communicator(layer.name).broadcast_(basis)
        module.set_subspace(found)

    def _following(self, statistic: Tensor, basis: Tensor, *, of_rows: bool) -> Tensor:
        """:meth:`_basis`, or a stack of them; an expert without tokens keeps its own."""
        if basis.dim() == 2:
            return self._basis(statistic, basis, of_rows=of_rows)
        stacked = statistic.view(basis.shape[0], -1, statistic.shape[1])
        found = self._basis(stacked, basis, of_rows=of_rows)
        return torch.where(stacked.ne(0.0).any(2).any(1)[:, None, None], found, basis.to(found.dtype))

    def _basis(self, statistic: Tensor, basis: Tensor, *, of_rows: bool) -> Tensor:
        """What follows ``basis``, ``(m or n, rank)``, given a gradient or its sketch; of stacked matrices, of each."""
        former = basis.to(statistic.dtype)
        if self.options.projector == "power":
            return aligned(iterated_basis(statistic, former, of_rows=of_rows), former)
        return aligned(leading_basis(statistic, basis.shape[-1], of_rows=of_rows), former)


def _convert(targets: dict[str, nn.Linear | StackedMatrices], options: GaLoreOptions) -> Converted:
    """Convert the targets with seeded random bases, each expert's its own; those whose smaller dimension is the rank
    are named only.

    Raises:
        ValueError: the rank is above a layer's smaller dimension; no layer is converted then.
    """
    _check_rank(targets, options.rank)
    layers, full, side = [], [], options.side
    for name, linear in targets.items():
        m, n = outputs_and_inputs(linear)
        own_rank = rank_of(min(m, n), rank=options.rank, density=options.density)
        on_left = side in ("left", "full") or (side == "std" and m < n)
        on_right = side in ("right", "full") or (side == "std" and m >= n)
        if own_rank == min(m, n):
            full.append(name)
            continue
        bases = {}
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        for key, dim, used in (("left", m, on_left), ("right", n, on_right)):
            if not used:
                continue
            stack = (linear.num_matrices,) if isinstance(linear, StackedMatrices) else ()
            if linear.weight.is_meta:
                bases[key] = torch.empty(*stack, dim, own_rank, dtype=dtype, device="meta")
                continue
            names = [f"{name}.{expert}" for expert in range(*stack)] if stack else [name]
            seeds = [derive_seed(options.seed, "basis", key, own) for own in names]
            drawn = [random_basis(dim, own_rank, seed=seed) for seed in seeds]
            bases[key] = torch.stack(drawn).view(*stack, dim, own_rank).to(dtype)
        layers.append(CompactLayer(name, to_projected(linear, **bases, scale=options.scale)))
    return Converted(layers, full)


def _check_rank(targets: dict[str, nn.Linear | StackedMatrices], rank: int | None) -> None:
    smaller = {name: min(outputs_and_inputs(linear)) for name, linear in targets.items()}
    too_small = [name for name, side in smaller.items() if rank is not None and rank > side]
    if too_small:
        name = min(too_small, key=lambda name: smaller[name])
        others = f" and of {len(too_small) - 1} other layers" if len(too_small) > 1 else ""
        raise ValueError(
            f"rank: {rank} is above the smaller dimension, {smaller[name]}, of {name!r}{others}; at most"
            f" {smaller[name]} fits every layer"
        )
