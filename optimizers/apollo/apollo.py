"""APOLLO: SGD whose rate for each channel or matrix is Adam's, estimated from a random projection of the gradient."""

# torch's foreach functions have no public names.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..layers.shape import whole_shape
from ..numerics.adam import adam_directions, late_correction
from ..numerics.precision import compute_dtype, widen, write_back
from ..numerics.seeds import derive_seed
from ..options import check_adam, check_choice, check_count, check_number
from ..sharded import ShardedOptimizer
from ..sharding.blocks import blocks_of
from ..sharding.shards import Shard, StatePiece
from .channels import Layout, ScaleType, is_tall, own_channels, sides_of

_REFERENCE_EPS = 1e-8


class Apollo(ShardedOptimizer):
    """Scales the gradient of each matrix by factors that Adam's moments of a random projection of it give.

    With ``G`` of shape (m, n), m <= n (otherwise transposed): ``R = P G`` of shape (rank, n), ``P`` random normal with
    variance 1/rank, drawn anew every ``refresh_interval`` steps; ``D`` is Adam's direction for ``R``. APOLLO updates by
    ``-lr * scale * G diag(s)`` with one factor ``s_j = ||D[:, j]|| / ||R[:, j]||`` per channel, APOLLO-Mini with one
    factor ``||D|| / ||R||`` per matrix; where a norm of ``R`` is zero the factor is zero. The limiter shortens updates
    whose norm would exceed ``norm_growth_limit`` times that of the matrix's previous update. All other parameters are
    AdamW's. The moments are kept at a refresh, as in the paper.

    Source: Zhu, Zhang, Cong et al. (2025), "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270,
    Algorithm 1; the limiter is Fira's (arXiv 2410.01623). The authors' package ``apollo-torch`` 1.0.3 deviates from
    the paper, and so from this class, in the following, which ``reference_compatible`` matches:

    - ``eps`` is added to ``sqrt(v)`` before the bias correction, for matrices and for other parameters;
    - the bias correction multiplies the step and not ``D``, so the limiter compares norms without it;
    - 1e-8 is added to the norms of ``R`` and to the previous update's norm; a matrix whose gradient was once zero is
      therefore held near zero by the limiter, while here the limiter starts again;
    - the decay follows the update and acts on the updated weights;
    - the seed of a parameter is its position in the optimizer's groups, from 1, and the next one is drawn from it.

    Three differences remain: its option ``scale`` is the square of this one; it keeps ``P`` between steps, where here
    it is drawn again from the stored seed at each step; its bf16 parameters are computed with and kept in bf16.

    Under ZeRO: **no traffic is saved**, since the whole averaged gradient is needed. Each call of ``step`` adds two
    all-reduces in fp32, of ``(rank + 1) * c`` and ``c`` numbers where c sums the longer sides of the call's matrices
    (with ``scale_type="tensor"`` ``rank * c`` and one per matrix). They also are its temporary memory. State: two
    moments of ``rank`` numbers per channel, ``8 * rank * c`` bytes in fp32 over all ranks, cut by channels in
    proportion to the parameters' shards; a seed and a norm per matrix. Other parameters have two moments of their
    shape. Moments are fp32 also for bf16 and fp16 parameters; bf16 parameters are rounded stochastically, fp16 ones to
    nearest. ``P`` depends on the kind of device it is drawn on: a run that moves between CPU and GPU changes it.

    Args:
        model: whose trainable parameters are all updated.
        lr: learning rate of the dense parameters.
        rank: of the projection; at most the shorter side of every matrix. The paper's is 1/4 of the shorter side, and 1
            for APOLLO-Mini.
        refresh_interval: optimizer steps between changes of the projection; None keeps the first one.
        scale: the paper's alpha; default 1 for ``channel`` and, as for APOLLO-Mini, sqrt(128) for ``tensor``.
        scale_type: ``channel``, or ``tensor`` as in APOLLO-Mini.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``, for matrices and other parameters.
        norm_growth_limit: above 1; None for no limiter.
        matrix_lr_scale: learning rate of the matrices relative to ``lr``.
        target_modules: globs over the names of the modules whose weights are projected; default every linear inside the
            transformer blocks.
        param_groups: ``{"params": [globs over parameter names], **options}`` with ``lr``, ``betas``, ``eps`` or
            ``weight_decay``; the first match wins.
        seed: of the projections; the same on all process ranks.
        reference_compatible: compute as ``apollo-torch`` 1.0.3 does.
        foreach: update the other parameters in one batch per group, which takes temporary memory of their size;
            default on GPUs only.

    Raises:
        ValueError: an option out of range, a rank above a matrix's shorter side, or globs that match nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        rank: int,
        refresh_interval: int | None = 200,
        scale: float | None = None,
        scale_type: ScaleType = "channel",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        norm_growth_limit: float | None = 1.01,
        matrix_lr_scale: float = 1.0,
        target_modules: Sequence[str] | None = None,
        param_groups: Sequence[dict[str, Any]] = (),
        seed: int = 0,
        reference_compatible: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self.check_options(
            lr=lr,
            rank=rank,
            refresh_interval=refresh_interval,
            scale=scale,
            scale_type=scale_type,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            norm_growth_limit=norm_growth_limit,
            matrix_lr_scale=matrix_lr_scale,
        )
        super().__init__(
            model,
            lr=lr,
            defaults={"betas": betas, "eps": eps, "weight_decay": weight_decay},
            matrix_lr_scale=matrix_lr_scale,
            target_modules=target_modules,
            param_groups=param_groups,
        )
        _check_rank(model, self.targets, rank)
        self.rank = rank
        self.refresh_interval = refresh_interval
        self.scale_type: ScaleType = scale_type
        self.scale = scale if scale is not None else 1.0 if scale_type == "channel" else math.sqrt(128.0)
        self.norm_growth_limit = norm_growth_limit
        self.seed = seed
        self.reference_compatible = reference_compatible
        self.foreach = foreach
        self.num_refreshes = 0
        self._seeds = self._first_seeds(model)
        self._norms: dict[str, Tensor] = {}

    @classmethod
    def mini(cls, model: nn.Module, **options: Any) -> "Apollo":
        """APOLLO-Mini: ``rank=1`` and ``scale_type="tensor"``, with its scale of sqrt(128) unless another is given."""
        return cls(model, **{"rank": 1, "scale_type": "tensor", **options})

    @staticmethod
    def check_options(**options: Any) -> None:
        """Check the options that need no model.

        Raises:
            ValueError: naming the option, what was found and what is needed.
        """
        check_adam(options)
        check_count(options, "rank")
        check_count(options, "refresh_interval", optional=True)
        check_choice(options, "scale_type", get_args(ScaleType))
        if options["scale"] is not None:
            check_number(options, "scale", above=0.0)
        if options["norm_growth_limit"] is not None:
            check_number(options, "norm_growth_limit", above=1.0)

    def _first_seeds(self, model: nn.Module) -> dict[str, int]:
        if not self.reference_compatible:
            return {name: derive_seed(self.seed, 0, name) for name in self.targets}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        order = [names[id(parameter)] for group in self.param_groups for parameter in group["params"]]
        return {name: order.index(name) + 1 for name in self.targets}

    def after_step(self, learning_rates: Sequence[float]) -> None:
        """Count a finished step, and change the projections when it is due.

        Args:
            learning_rates: those the step was taken with.
        """
        super().after_step(learning_rates)
        if self.refresh_interval is not None and self.num_steps % self.refresh_interval == 0:
            self.num_refreshes += 1
            for name, seed in self._seeds.items():
                self._seeds[name] = (
                    _next_reference_seed(seed)
                    if self.reference_compatible
                    else derive_seed(self.seed, self.num_refreshes, name)
                )

    def _update(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        if group["kind"] == "dense":
            together = self.foreach if self.foreach is not None else flats[0].is_cuda
            for batch in [flats] if together else [[flat] for flat in flats]:
                self._update_dense(group, batch)
        else:
            # Only where sums go over the wire does one for all matrices pay for its temporary memory.
            together = self.shards.num_process_ranks > 1
            for batch in [flats] if together else [[flat] for flat in flats]:
                self._update_matrices(group, batch)

    def _update_dense(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        values = [widen(flat) for flat in flats]
        states = [self._moments(flat, value.shape) for flat, value in zip(flats, values, strict=True)]
        directions = self._directions(group, states, [widen(flat.grad) for flat in flats if flat.grad is not None])
        lr = float(group["lr"])
        keep = 1.0 - lr * group["weight_decay"]
        if not self.reference_compatible:
            torch._foreach_mul_(values, keep)
        torch._foreach_mul_(directions, [-lr * self._late_correction(group, state) for state in states])
        torch._foreach_add_(values, directions)
        if self.reference_compatible:
            torch._foreach_mul_(values, keep)
        for flat, value in zip(flats, values, strict=True):
            for shard in self.shards.shards_of(flat):
                self._write_back(shard, shard.of(value))

    def _update_matrices(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        layout = Layout(self._members(flats), self.scale_type)
        projected, squares = self._project(flats, layout)
        states = [self._moments(flat, self._low_rank_shape(flat)) for flat in flats]
        adapted = self._adapt(group, flats, states, layout, projected)
        own = torch.linalg.vector_norm(projected, dim=1)
        if self.scale_type == "tensor":
            own = layout.total(own.square(), layout.channels).sqrt_()
        if self.reference_compatible:
            factors = adapted / (own + _REFERENCE_EPS)
        else:
            factors = torch.where(own > 0.0, adapted / own, 0.0)
        if self.norm_growth_limit is not None:
            norms = layout.total(factors.square() * squares, layout.factors).sqrt_()
            limits = self._limit(list(layout.factors), norms)
            for part, limit in zip(layout.split(factors, layout.factors), limits.unbind(), strict=True):
                part.mul_(limit)
        for flat, state in zip(flats, states, strict=True):
            self._apply(group, flat, layout, factors, self._late_correction(group, state))

    def _members(self, flats: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
        return {name: shape for flat in flats for name, shape in self.shards.members_of(flat).items()}

    def _project(self, flats: Sequence[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
        """``R`` of all matrices, (channels, rank), and the squared norms of what shares a factor, (factors,)."""
        num_channels = layout.num_channels
        buffer = torch.zeros(
            num_channels * self.rank + layout.num_factors, dtype=compute_dtype(flats[0]), device=flats[0].device
        )
        projected = buffer[: num_channels * self.rank].view(num_channels, self.rank)
        squares = buffer[num_channels * self.rank :]
        for flat in flats:
            for shard in self.shards.shards_of(flat):
                basis = self._projection(shard, buffer)
                channels, factors = projected[layout.channels[shard.name]], squares[layout.factors[shard.name]]
                gradient = widen(shard.of(_gradient(flat)))
                for block in blocks_of(shard):
                    part = block.of(gradient) if is_tall(shard.shape) else block.of(gradient).T
                    across, along = sides_of(shard.shape, block)
                    channels[along].addmm_(part, basis[across])
                    norms = torch.linalg.vector_norm(part, dim=1).square()
                    if self.scale_type == "channel":
                        factors[along].add_(norms)
                    else:
                        factors.add_(norms.sum())
        self.shards.sum_(buffer)
        return projected, squares

    def _projection(self, shard: Shard, like: Tensor) -> Tensor:
        """``P`` transposed, (shorter side, rank), drawn from the matrix's seed."""
        rows, columns = shard.shape
        generator = torch.Generator(like.device).manual_seed(self._seeds[shard.name])
        shape = (self.rank, columns) if is_tall(shard.shape) else (rows, self.rank)
        drawn = torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32) / math.sqrt(self.rank)
        return (drawn.T if is_tall(shard.shape) else drawn).to(like.dtype)

    def _adapt(
        self,
        group: dict[str, Any],
        flats: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        layout: Layout,
        projected: Tensor,
    ) -> Tensor:
        """Update this rank's part of the moments and return the norms of Adam's directions, (factors,)."""
        owned = [self._owned(flat) for flat in flats]
        gradients = [
            torch.cat([projected[:0], *(layout.part(projected, shard, channels) for shard, channels in ranges)])
            for ranges in owned
        ]
        squares = projected.new_zeros(layout.num_factors)
        for ranges, direction in zip(owned, self._directions(group, states, gradients), strict=True):
            norms = torch.linalg.vector_norm(direction, dim=1).square()
            parts = norms.split([len(channels) for _, channels in ranges])
            for (shard, channels), part in zip(ranges, parts, strict=True):
                if self.scale_type == "channel":
                    layout.part(squares, shard, channels).add_(part)
                else:
                    squares[layout.factors[shard.name]].add_(part.sum())
        return self.shards.sum_(squares).sqrt_()

    def _limit(self, names: Sequence[str], norms: Tensor) -> Tensor:
        """What to multiply each matrix's update by so that its norm does not grow too fast, (matrices,)."""
        assert self.norm_growth_limit is not None
        none = norms.new_tensor(-1.0)
        previous = torch.stack([self._norms.get(name, none).to(norms) for name in names])
        if self.reference_compatible:
            growth = (norms / (previous + _REFERENCE_EPS)).clamp(min=self.norm_growth_limit)
            limits = torch.where(previous >= 0.0, self.norm_growth_limit / growth, 1.0)
        else:
            limits = (self.norm_growth_limit * previous / norms).clamp(max=1.0)
            limits = torch.where((previous > 0.0) & (norms > 0.0), limits, 1.0)
        self._norms.update(zip(names, (norms * limits).unbind(), strict=True))
        return limits

    def _apply(self, group: dict[str, Any], flat: Tensor, layout: Layout, factors: Tensor, correction: float) -> None:
        lr = float(group["lr"])
        keep = 1.0 - lr * group["weight_decay"]
        for shard in self.shards.shards_of(flat):
            value, gradient = widen(shard.of(flat)), widen(shard.of(_gradient(flat)))
            own = factors[layout.factors[shard.name]]
            if not self.reference_compatible:
                value.mul_(keep)
            for block in blocks_of(shard):
                if self.scale_type == "channel":
                    _, along = sides_of(shard.shape, block)
                    factor = own[along, None] if is_tall(shard.shape) else own[along]
                else:
                    factor = own
                block.of(value).addcmul_(block.of(gradient), factor, value=-lr * self.scale * correction)
            if self.reference_compatible:
                value.mul_(keep)
            self._write_back(shard, value)

    def _directions(
        self, group: dict[str, Any], states: Sequence[dict[str, Any]], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        for state in states:
            state["step"] += 1
        return adam_directions(
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            steps=[state["step"] for state in states],
            betas=group["betas"],
            eps=group["eps"],
            corrected=not self.reference_compatible,
        )

    def _late_correction(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        return late_correction(state["step"], group["betas"]) if self.reference_compatible else 1.0

    def _write_back(self, shard: Shard, value: Tensor) -> None:
        seed = derive_seed(self.seed, self.num_steps, shard.name)
        write_back(shard.of(shard.flat), value, seed=seed, position=shard.position)

    def _moments(self, flat: Tensor, shape: Sequence[int]) -> dict[str, Any]:
        """The state of ``flat``, made if it is not there yet."""
        state = self.state[flat]
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = torch.zeros(shape, dtype=compute_dtype(flat), device=flat.device)
        state.setdefault("step", 0)
        return state

    def _owned(self, flat: Tensor) -> list[tuple[Shard, range]]:
        """The shards in ``flat`` and the channels whose moments this rank keeps, in the moments' order."""
        return [(shard, own_channels(shard)) for shard in self.shards.shards_of(flat)]

    def _low_rank_shape(self, flat: Tensor) -> tuple[int, int]:
        return sum(len(channels) for _, channels in self._owned(flat)), self.rank

    def state_pieces(self, flat: Tensor) -> Iterable[StatePiece]:
        """The moments of matrices; those of the whole parameter are (channels, rank), flattened."""
        if not self._seeds.keys() >= self.shards.members_of(flat).keys():
            return
        owned = self._owned(flat)
        state = self._moments(flat, self._low_rank_shape(flat))
        for key in ("exp_avg", "exp_avg_sq"):
            parts = state[key].split([len(channels) for _, channels in owned])
            for (shard, channels), part in zip(owned, parts, strict=True):
                yield StatePiece(shard.name, key, channels.start * self.rank, part.view(-1))

    def subspace_state(self) -> dict[str, Any]:
        """JSON values: counters, the projections' seeds, and the limiter's norms."""
        return {
            **super().subspace_state(),
            "num_refreshes": self.num_refreshes,
            "rank": self.rank,
            "scale_type": self.scale_type,
            "seeds": dict(self._seeds),
            "norms": {name: float(norm) for name, norm in self._norms.items()},
        }

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        super().load_subspace_state(state)
        self.num_refreshes = state["num_refreshes"]
        self._seeds = dict(state["seeds"])
        self._norms = {name: torch.tensor(norm, dtype=torch.float64) for name, norm in state["norms"].items()}

    def _check_subspace_state(self, state: dict[str, Any]) -> None:
        super()._check_subspace_state(state)
        for key, own in (("rank", self.rank), ("scale_type", self.scale_type)):
            if state[key] != own:
                raise ValueError(f"Apollo state: it was saved with {key} {state[key]!r}, this optimizer has {own!r}")
        if odd := sorted(set(state["seeds"]) ^ set(self._seeds)):
            raise ValueError(f"Apollo state: its matrices differ from this model's, for example {odd[:4]}")


def _gradient(flat: Tensor) -> Tensor:
    assert flat.grad is not None
    return flat.grad


def _next_reference_seed(seed: int) -> int:
    """The reference's next seed: the 15th integer drawn from a generator with this one."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(torch.iinfo(torch.int64).max, (15,), generator=generator)[-1])


def _check_rank(model: nn.Module, targets: Sequence[str], rank: int) -> None:
    shapes = {name: model.get_parameter(name) for name in targets}
    shorter = {name: min(whole_shape(p)) for name, p in shapes.items()}
    name, side = min(shorter.items(), key=lambda item: item[1])
    if rank > side:
        raise ValueError(f"rank: {rank} is above the shorter side {side} of {name!r}; at most {side} fits every matrix")
