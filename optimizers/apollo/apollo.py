"""APOLLO: SGD whose rate for each channel or matrix is Adam's, estimated from a random projection of the gradient."""

# torch's foreach functions have no public names.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine_optimizer import keywords_of
from ..numerics.adam import adam_directions
from ..numerics.precision import compute_dtype, widen, write_back
from ..numerics.seeds import derive_seed
from ..sharded import ShardedOptimizer
from ..sharding.blocks import blocks_of
from ..sharding.shards import Shard, StatePiece, all_members
from .channels import Layout, own_channels, sides_of
from .options import ApolloOptions


class Apollo(ShardedOptimizer[ApolloOptions]):
    """Scales the gradient of each matrix by factors that Adam's moments of a random projection of it give.

    With ``G`` of shape (m, n), m <= n (otherwise transposed): ``R = P G`` of shape (rank, n), ``P`` random normal with
    variance 1/rank, drawn anew every ``refresh_interval`` steps; ``D`` is Adam's direction for ``R``. APOLLO updates by
    ``-lr * scale * G diag(s)`` with one factor ``s_j = ||D[:, j]|| / ||R[:, j]||`` per channel, APOLLO-Mini with one
    factor ``||D|| / ||R||`` per matrix; where a norm of ``R`` is zero the factor is zero. The limiter shortens updates
    whose norm would exceed ``norm_growth_limit`` times that of the matrix's previous update. Of experts stacked in one
    parameter, every matrix counts. All other parameters are AdamW's. The moments are kept at a refresh, as in the
    paper.

    Source: Zhu, Zhang, Cong et al. (2025), "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270,
    Algorithm 1; the limiter is Fira's (arXiv 2410.01623). :class:`~.reference.ApolloReference`, which takes its place
    with ``reference_compatible``, lists where the authors' package differs.

    Under ZeRO: **no traffic is saved**, since the whole averaged gradient is needed. Each call of ``step`` adds two
    all-reduces in fp32, of ``(rank + 1) * c`` and ``c`` numbers where c sums the longer sides of the call's matrices
    (with ``scale_type="tensor"`` ``rank * c`` and one per matrix). They also are its temporary memory. State: two
    moments of ``rank`` numbers per channel, ``8 * rank * c`` bytes in fp32 over all ranks, cut by channels in
    proportion to the parameters' shards; a seed and a norm per matrix. Other parameters have two moments of their
    shape. Moments are fp32 also for bf16 and fp16 parameters; bf16 parameters are rounded stochastically, fp16 ones to
    nearest. ``P`` depends on the kind of device it is drawn on: a run that moves between CPU and GPU changes it.

    Args:
        model: whose trainable parameters are all updated.
        options: the fields of :class:`~.options.ApolloOptions`, as keywords.

    Raises:
        ValueError: an option out of range, a rank above a matrix's shorter side, or globs that match nothing.
    """

    type_name: ClassVar[str] = "Apollo"
    decays_last: ClassVar[bool] = False
    corrects_moments: ClassVar[bool] = True
    options_type = ApolloOptions

    @keywords_of(ApolloOptions)
    def __init__(self, model: nn.Module, options: ApolloOptions) -> None:
        super().__init__(model, options)
        self._check_rank(options.rank)
        default_scale = 1.0 if options.scale_type == "channel" else math.sqrt(128.0)
        self.scale = options.scale if options.scale is not None else default_scale
        self.num_refreshes = 0
        self._seeds = self._first_seeds(model)
        self._norms: dict[str, Tensor] = {}

    @classmethod
    def carries_out(cls, options: ApolloOptions) -> bool:
        return not options.reference_compatible

    @classmethod
    def mini(cls, model: nn.Module, **options: Any) -> "Apollo":
        """APOLLO-Mini: ``rank=1`` and ``scale_type="tensor"``, with its scale of sqrt(128) unless another is given."""
        return cls(model, **{"rank": 1, "scale_type": "tensor", **options})

    def _check_rank(self, rank: int) -> None:
        shorter = {name: min(self.members[name].shape) for name in self.targets}
        name, side = min(shorter.items(), key=lambda item: item[1])
        if rank > side:
            raise ValueError(
                f"rank: {rank} is above the shorter side {side} of {name!r}; at most {side} fits every matrix"
            )

    def _first_seeds(self, model: nn.Module) -> dict[str, int]:
        return {name: derive_seed(self.options.seed, 0, name) for name in self.targets}

    def _next_seed(self, name: str) -> int:
        return derive_seed(self.options.seed, self.num_refreshes, name)

    def after_step(self, learning_rates: Sequence[float]) -> None:
        """Count a finished step, and change the projections when it is due.

        Args:
            learning_rates: those the step was taken with.
        """
        super().after_step(learning_rates)
        if self.options.refresh_interval is not None and self.num_steps % self.options.refresh_interval == 0:
            self.num_refreshes += 1
            self._seeds = {name: self._next_seed(name) for name in self._seeds}

    def _update(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        if group["kind"] == "dense":
            together = self.options.foreach if self.options.foreach is not None else flats[0].is_cuda
            for batch in [flats] if together else [[flat] for flat in flats]:
                self._update_dense(group, batch)
        else:
            # Only where sums go over the wire does one for all matrices pay for its temporary memory.
            together = self.shards.is_cut
            for batch in [flats] if together else [[flat] for flat in flats]:
                self._update_matrices(group, batch)

    def _update_dense(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        values = [widen(flat) for flat in flats]
        states = [self._moments(flat, value.shape) for flat, value in zip(flats, values, strict=True)]
        directions = self._directions(group, states, [widen(flat.grad) for flat in flats if flat.grad is not None])
        lr = float(group["lr"])
        keep = 1.0 - lr * group["weight_decay"]
        if not self.decays_last:
            torch._foreach_mul_(values, keep)
        torch._foreach_mul_(directions, [-lr * self._late_correction(group, state) for state in states])
        torch._foreach_add_(values, directions)
        if self.decays_last:
            torch._foreach_mul_(values, keep)
        for flat, value in zip(flats, values, strict=True):
            for shard in self.shards.shards_of(flat):
                self._write_back(shard, shard.of(value))

    def _update_matrices(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        layout = Layout(all_members(self.shards, flats), self.options.scale_type)
        projected, squares = self._project(flats, layout)
        states = [self._moments(flat, self._low_rank_shape(flat)) for flat in flats]
        adapted = self._adapt(group, flats, states, layout, projected)
        own = torch.linalg.vector_norm(projected, dim=1)
        if self.options.scale_type == "tensor":
            own = layout.total(own.square(), layout.channels).sqrt_()
        factors = self._ratios(adapted, own)
        if self.options.norm_growth_limit is not None:
            norms = layout.total(factors.square() * squares, layout.factors).sqrt_()
            limits = self._limit(list(layout.factors), norms)
            for part, limit in zip(layout.split(factors, layout.factors), limits.unbind(), strict=True):
                part.mul_(limit)
        for flat, state in zip(flats, states, strict=True):
            self._apply(group, flat, layout, factors, self._late_correction(group, state))

    def _project(self, flats: Sequence[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
        """``R`` of all matrices, (channels, rank), and the squared norms of what shares a factor, (factors,)."""
        num_channels = layout.num_channels
        buffer = torch.zeros(
            num_channels * self.options.rank + layout.num_factors, dtype=compute_dtype(flats[0]), device=flats[0].device
        )
        projected = buffer[: num_channels * self.options.rank].view(num_channels, self.options.rank)
        squares = buffer[num_channels * self.options.rank :]
        for flat in flats:
            for shard in _counted(self.shards.shards_of(flat)):
                basis, tall = self._projection(shard, buffer), self._is_tall(shard)
                channels, factors = projected[layout.channels[shard.name]], squares[layout.factors[shard.name]]
                gradient = widen(shard.of(_gradient(flat)))
                for block in blocks_of(shard):
                    part = block.of(gradient) if tall else block.of(gradient).T
                    across, along = sides_of(block, tall=tall)
                    channels[along].addmm_(part, basis[across])
                    norms = torch.linalg.vector_norm(part, dim=1).square()
                    if self.options.scale_type == "channel":
                        factors[along].add_(norms)
                    else:
                        factors.add_(norms.sum())
        self.shards.sum_(buffer)
        return projected, squares

    def _projection(self, shard: Shard, like: Tensor) -> Tensor:
        """``P`` transposed, (shorter side, rank), drawn from the matrix's seed."""
        shorter, rank = min(shard.shape), self.options.rank
        generator = torch.Generator(like.device).manual_seed(self._seeds[shard.name])
        # A matrix of inputs times outputs has the projection of its transpose.
        is_right = self._is_tall(shard) != self.members[shard.name].is_transposed
        shape = (rank, shorter) if is_right else (shorter, rank)
        drawn = torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32) / math.sqrt(rank)
        return (drawn.T if is_right else drawn).to(like.dtype)

    def _is_tall(self, shard: Shard) -> bool:
        m, n = shard.shape
        return m > n or (m == n and not self.members[shard.name].is_transposed)

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
                if not shard.is_counted:
                    continue
                if self.options.scale_type == "channel":
                    layout.part(squares, shard, channels).add_(part)
                else:
                    squares[layout.factors[shard.name]].add_(part.sum())
        return self.shards.sum_(squares).sqrt_()

    def _limit(self, names: Sequence[str], norms: Tensor) -> Tensor:
        """What to multiply each matrix's update by so that its norm does not grow too fast, (matrices,)."""
        assert self.options.norm_growth_limit is not None
        none = norms.new_tensor(-1.0)
        previous = torch.stack([self._norms.get(name, none).to(norms) for name in names])
        limits = self._limits(norms, previous, self.options.norm_growth_limit)
        self._norms.update(zip(names, (norms * limits).unbind(), strict=True))
        return limits

    def _apply(self, group: dict[str, Any], flat: Tensor, layout: Layout, factors: Tensor, correction: float) -> None:
        lr = float(group["lr"])
        keep = 1.0 - lr * group["weight_decay"]
        for shard in self.shards.shards_of(flat):
            value, gradient = widen(shard.of(flat)), widen(shard.of(_gradient(flat)))
            own, tall = factors[layout.factors[shard.name]], self._is_tall(shard)
            if not self.decays_last:
                value.mul_(keep)
            for block in blocks_of(shard):
                if self.options.scale_type == "channel":
                    _, along = sides_of(block, tall=tall)
                    factor = own[along, None] if tall else own[along]
                else:
                    factor = own
                block.of(value).addcmul_(block.of(gradient), factor, value=-lr * self.scale * correction)
            if self.decays_last:
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
            corrected=self.corrects_moments,
        )

    def _late_correction(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        """What the step is multiplied by, where the moments are not corrected."""
        return 1.0

    def _ratios(self, adapted: Tensor, own: Tensor) -> Tensor:
        """The gradient's factors, (factors,), from the norms of Adam's directions and of the projection."""
        return torch.where(own > 0.0, adapted / own, 0.0)

    def _limits(self, norms: Tensor, previous: Tensor, growth: float) -> Tensor:
        """The limiter's factors, (matrices,); ``previous`` is negative where there was no update yet."""
        limits = (growth * previous / norms).clamp(max=1.0)
        return torch.where((previous > 0.0) & (norms > 0.0), limits, 1.0)

    def _write_back(self, shard: Shard, value: Tensor) -> None:
        seed = derive_seed(self.options.seed, self.num_steps, shard.name)
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
        return sum(len(channels) for _, channels in self._owned(flat)), self.options.rank

    def state_pieces(self, flat: Tensor) -> Iterable[StatePiece]:
        """The moments of matrices; those of the whole parameter are (channels, rank), flattened."""
        if not self._seeds.keys() >= self.shards.members_of(flat).keys():
            return
        owned = self._owned(flat)
        state = self._moments(flat, self._low_rank_shape(flat))
        for key in ("exp_avg", "exp_avg_sq"):
            parts = state[key].split([len(channels) for _, channels in owned])
            for (shard, channels), part in zip(owned, parts, strict=True):
                first, shape = channels.start * self.options.rank, (max(shard.shape), self.options.rank)
                yield StatePiece(shard.name, key, first, part.view(-1), shape)

    def subspace_state(self) -> dict[str, Any]:
        """JSON values: counters, the projections' seeds, and the limiter's norms."""
        return {
            **super().subspace_state(),
            "num_refreshes": self.num_refreshes,
            "rank": self.options.rank,
            "scale_type": self.options.scale_type,
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
        for key, own in (("rank", self.options.rank), ("scale_type", self.options.scale_type)):
            if state[key] != own:
                raise ValueError(f"Apollo state: expected {key} {own!r}, got {state[key]!r}")
        if odd := sorted(set(state["seeds"]) ^ set(self._seeds)):
            raise ValueError(f"Apollo state: its matrices differ from this model's, for example {odd[:4]}")


def _gradient(flat: Tensor) -> Tensor:
    assert flat.grad is not None
    return flat.grad


def _counted(shards: Sequence[Shard]) -> Iterator[Shard]:
    return (shard for shard in shards if shard.is_counted)
