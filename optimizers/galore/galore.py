"""GaLore: a base optimizer on gradients projected into a low-rank subspace."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..compact.backend import SubspaceBackend
from ..compact.inner import BaseName, check_base
from ..compact.optimizer import CompactOptimizer
from ..compact.sketches import directions
from ..layers.registry import to_projected
from ..layers.shape import whole_shape
from ..layers.targets import CompactLayer, find_targets, rank_of
from ..layers.wrappers import refuse_wrapped
from ..numerics.seeds import derive_seed
from ..options import check_adam, check_choice, check_count, check_number, check_one_given, check_share
from .bases import aligned, iterated_basis, leading_basis, random_basis

Side = Literal["std", "left", "right", "full"]
Projector = Literal["sketch", "svd", "power"]
Moments = Literal["keep", "reset"]


class GaLore(CompactOptimizer):
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
    how the singular vectors are found. The reference implementation ``galore-torch`` 1.0 deviates from the paper in
    adding epsilon outside of the bias correction and in decaying after the update, leaves the signs to the SVD, and
    finds it in fp32 whatever the weights' precision; ``reference_compatible`` does so too.

    Args:
        model: not yet wrapped by DDP, FSDP or ``torch.compile``.
        lr: learning rate of the dense parameters.
        rank: of the subspace; give this or ``density``. A layer whose smaller dimension does not exceed it stays an
            ordinary layer and is trained at the matrices' rate.
        density: rank as a share of a layer's smaller dimension, in (0, 1].
        refresh_interval: optimizer steps between changes of subspace; None keeps the random one.
        scale: alpha of the paper, factor of the change; decay is not scaled.
        side: ``left`` projects the rows (``A``, ``m x r``), ``right`` the columns (``B``, ``n x r``; also shrinks what
            is kept for backward), ``full`` both, ``std`` the smaller dimension as the paper.
        projector: ``sketch`` reduces ``rank + oversampling`` vectors per layer at a refresh; ``svd`` and ``power`` form
            and reduce the whole gradient of every layer at that step.
        oversampling: further directions of the sketch. With 16 its basis captured 98 to 100 % of the energy that SVD's
            captures, in every layer of a small LLaMA trained for 40 steps, at densities from 1/16 to 1/4.
        moments: at a refresh, ``keep`` as the paper, or ``reset`` with the step count.
        betas, eps, weight_decay, foreach, fused: as in ``torch.optim.AdamW``.
        matrix_lr_scale: learning rate of the matrices relative to ``lr``.
        target_modules: globs over module names; default every linear inside the transformer blocks.
        param_groups: ``{"params": [globs over parameter names], **options}`` with ``lr``, ``betas``, ``eps`` or
            ``weight_decay``; the first match wins.
        seed: of the first bases and the sketch; the same on all process ranks.
        base: the optimizer of all parameters: ``AdamW``, ``AdamW8bit`` (bitsandbytes; a checkpoint of the engine holds
            its moments in fp32 and a resume quantises them anew) or ``Adafactor`` (plain PyTorch and DDP only; its
            steps are relative to the size of the whole weight).
        reference_compatible: as ``galore-torch``, in plain PyTorch and DDP only: the bases are taken from the gradient
            of the same step, epsilon and decay as above, moments are kept. Needs ``projector="svd"`` and base AdamW.
            Where gradients are clipped, the norm is that of their projection with the former bases.
        backend: where the tensors live; given by an engine.

    Raises:
        ValueError: an option out of range, globs that match nothing, or a model that is already wrapped.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        rank: int | None = None,
        density: float | None = None,
        refresh_interval: int | None = 200,
        scale: float = 0.25,
        side: Side = "std",
        projector: Projector = "sketch",
        oversampling: int = 16,
        moments: Moments = "keep",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        matrix_lr_scale: float = 1.0,
        target_modules: Sequence[str] | None = None,
        param_groups: Sequence[dict[str, Any]] = (),
        seed: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
        base: BaseName = "AdamW",
        reference_compatible: bool = False,
        backend: SubspaceBackend | None = None,
    ) -> None:
        self.check_options(
            lr=lr,
            rank=rank,
            density=density,
            refresh_interval=refresh_interval,
            scale=scale,
            side=side,
            projector=projector,
            oversampling=oversampling,
            moments=moments,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            matrix_lr_scale=matrix_lr_scale,
            foreach=foreach,
            fused=fused,
            base=base,
            reference_compatible=reference_compatible,
        )
        refuse_wrapped(model, in_engine=backend is not None)
        self.projector, self.oversampling, self.moments = projector, oversampling, moments
        self.reference_compatible = reference_compatible
        layers, full_rank = _convert(
            find_targets(model, target_modules), rank=rank, density=density, side=side, scale=scale, seed=seed
        )
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
    def check_options(**options: Any) -> None:
        check_one_given(options, ("rank", "density"))
        check_count(options, "rank", optional=True)
        check_share(options, "density")
        check_count(options, "refresh_interval", optional=True)
        check_number(options, "scale", above=0.0)
        check_choice(options, "side", ("std", "left", "right", "full"))
        check_choice(options, "projector", ("sketch", "svd", "power"))
        check_number(options, "oversampling", at_least=0)
        if not isinstance(options["oversampling"], int):
            raise ValueError(f"oversampling: {options['oversampling']!r} found, an integer is needed")
        check_choice(options, "moments", ("keep", "reset"))
        check_adam(options)
        check_base(options["base"], foreach=options["foreach"], fused=options["fused"])
        if options["side"] == "full" and options["projector"] == "sketch":
            raise ValueError("projector: 'sketch' found with side 'full', which needs 'svd' or 'power'")
        if options["reference_compatible"]:
            for key, needed in (("projector", "svd"), ("base", "AdamW"), ("moments", "keep")):
                if options[key] != needed:
                    raise ValueError(f"{key}: {options[key]!r} found, {needed!r} is needed with reference_compatible")

    def is_refresh_due(self) -> bool:
        """Whether the step just counted is one whose gradient gives the next bases: 1, 1 + refresh_interval, ..."""
        return not self.reference_compatible and self._is_observed(self.num_steps - 1)

    def _is_observed(self, step: int) -> bool:
        return self.refresh_interval is not None and bool(self.layers) and step % self.refresh_interval == 0

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        super().load_subspace_state(state)
        self._observe_next_step()

    def _observe_next_step(self) -> None:
        """Observe the full gradients of the coming step if the next bases are taken from them, else none."""
        is_observed = self._is_observed(self.num_steps)
        for layer in self.layers:
            if not is_observed:
                layer.module.drop_probe()
            elif self.projector == "sketch":
                side = layer.module.side
                size = min(layer.module.rank + self.oversampling, *layer.module.weight_shape)
                omega = directions(layer, side=side, size=size, seed=derive_seed(self.seed, self.num_refreshes))
                layer.module.start_probe(side, omega)
            else:
                layer.module.start_probe("full")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self.reference_compatible:
            return super().step(closure)
        if closure is not None:
            raise ValueError("reference_compatible: step takes no closure, the gradient is needed before the step")
        if self._is_observed(self.num_steps):
            self._refresh_before_step()
        return self._reference_step()

    @torch.no_grad()
    def _refresh_before_step(self) -> None:
        """Take the bases from this step's gradient and project it anew."""
        self.num_refreshes += 1
        gradients = self._observed()
        for layer, gradient in zip(self.layers, gradients, strict=True):
            module = layer.module
            before = module.project_gradient(gradient)
            self._set_bases(layer, gradient)
            given = module.compact.grad
            if given is not None:
                # What was done to the gradient after backward, clipping or unscaling, is done to the new one.
                factor = (given * before).sum() / before.square().sum().clamp_min(torch.finfo(before.dtype).tiny)
                given.copy_(module.project_gradient(gradient) * factor)

    def _reference_step(self) -> Any:
        """The base's step with epsilon added before the bias correction, and decay after the update."""
        groups = self.param_groups
        kept = [(group["eps"], group["weight_decay"]) for group in groups]
        for group in groups:
            # Adam's denominator is sqrt(v / correction) + eps.
            group["eps"] /= math.sqrt(1.0 - group["betas"][1] ** (self.num_steps + 1))
            if group["kind"] != "compact":
                group["weight_decay"] = 0.0
        loss = super().step()
        for group, (eps, decay) in zip(groups, kept, strict=True):
            group["eps"], group["weight_decay"] = eps, decay
            if group["kind"] != "compact" and decay:
                for parameter in (p for p in group["params"] if p.grad is not None):
                    parameter.data.mul_(1.0 - group["lr"] * decay)
        return loss

    @torch.no_grad()
    def _fold(self, learning_rates: Sequence[float]) -> None:
        decays = self._decays(learning_rates)
        if self.base == "Adafactor":
            self._scale_to_weights()
        seed = derive_seed(self.seed, "step", self.num_steps)
        self.backend.add_changes(self.layers, decays, seed=seed, decay_last=self.reference_compatible)

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
        if self.moments == "reset" or self.num_refreshes == 1:
            self._reset_moments()

    def _observed(self) -> list[Tensor]:
        return [self.backend.communicator(layer.name).average_(layer.module.end_probe()) for layer in self.layers]

    def _set_bases(self, layer: CompactLayer, statistic: Tensor) -> None:
        module, found = layer.module, {}
        for key, basis in module.subspace().items():
            of_rows = key == "left"
            if self.reference_compatible:
                found[key] = leading_basis(statistic.float(), basis.shape[1], of_rows=of_rows).to(basis.dtype)
                continue
            former = basis.to(statistic.dtype)
            if self.projector == "power":
                new = iterated_basis(statistic, former, of_rows=of_rows)
            else:
                new = leading_basis(statistic, basis.shape[1], of_rows=of_rows)
            found[key] = aligned(new, former).to(basis.dtype)
        # One rank's are everybody's: where singular values are nearly equal, rounding decides.
        for basis in found.values():
            self.backend.communicator(layer.name).broadcast_(basis)
        module.set_subspace(found)


def _convert(
    targets: dict[str, nn.Linear],
    *,
    rank: int | None,
    density: float | None,
    side: Side,
    scale: float,
    seed: int,
) -> tuple[list[CompactLayer], list[str]]:
    """Convert the targets with seeded random bases; those that the rank covers whole are named only."""
    layers, full = [], []
    for name, linear in targets.items():
        m, n = whole_shape(linear.weight)
        own_rank = rank_of(min(m, n), rank=rank, density=density)
        on_left = side in ("left", "full") or (side == "std" and m < n)
        on_right = side in ("right", "full") or (side == "std" and m >= n)
        if own_rank >= min(m, n):
            full.append(name)
            continue
        bases = {}
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        for key, dim, used in (("left", m, on_left), ("right", n, on_right)):
            if used and linear.weight.is_meta:
                bases[key] = torch.empty(dim, own_rank, dtype=dtype, device="meta")
            elif used:
                bases[key] = random_basis(dim, own_rank, seed=derive_seed(seed, "basis", key, name)).to(dtype)
        layers.append(CompactLayer(name, to_projected(linear, **bases, scale=scale)))
    return layers, full
