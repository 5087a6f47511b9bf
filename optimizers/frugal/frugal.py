"""FRUGAL: Adam on a rotating part of the coordinates, signSGD or SGD on all others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..layers.wrappers import wrappers_of
from ..numerics.precision import compute_dtype, widen, write_back
from ..numerics.seeds import derive_seed
from ..options import check_adam, check_choice, check_count, check_number
from ..sharded import ShardedOptimizer
from ..sharding.shards import ShardMap, StatePiece
from .coordinates import Part, put_, take
from .majority_vote import average_and_vote
from .projections import Compact, Projections, gradient_of
from .subspaces import LOW_RANK, BlockOrder, Rule, SelectionName, Slot, Subspaces

StateFree = Literal["signSGD", "SGD"]
Reduction = Literal["mean", "majority_vote"]
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Updates of a parameter, and of the moments that start again at a refresh.
_COUNTS = ("step", "since_refresh")


class Frugal(ShardedOptimizer):
    """Adam on a subspace that changes every ``refresh_interval`` steps, a rule without state on the rest.

    Each projected parameter's gradient is split in two: the *state-full* part (chosen columns, rows or coordinates,
    whole matrices, or a low-rank projection) is updated by AdamW, the *state-free* remainder by ``signSGD`` or
    ``SGD``. All parameters change their subspace together, and the moments and step counts of the projected ones then
    start again. Decay acts on all coordinates. Moments are kept in fp32 for the state-full coordinates only, 8 bytes
    for each, and cut over process ranks as the parameters are; which coordinates they are is derived from ``seed``.
    bf16 parameters are rounded stochastically, fp16 ones to nearest.

    **It saves memory, not traffic**: the whole averaged gradient is needed on every step, so between process ranks as
    much is sent as with AdamW (``reduction="majority_vote"`` is the exception).

    ``svd`` and ``random`` project with ``P`` of shape ``(min(m, n), rank)`` onto the shorter side. ``P`` is held on
    every rank, beside the state. Where shards are cut over ranks, each step sums two buffers over them, of as many
    numbers as there are state-full coordinates: partial projections, and the updates of the shards of the state. At
    a refresh ``svd`` also sums every projected gradient, one at a time, and all ``P`` together; each ``P`` is computed
    by one rank. :meth:`bytes_summed` gives the numbers.

    Source: Zmushko, Beznosikov, Takac, Horvath (2024), "FRUGAL: Memory-Efficient Optimization by Reducing State
    Overhead for Scalable Training", arXiv 2411.07837, and its published code: defaults, the reset of the state,
    ``std`` side of the projections, blocks that are single matrices, Adam for embeddings, norms and head. It
    deviates in that columns are the default selection, counts are rounded and at least 1 instead of cut off, decay
    follows ``matrix_lr_scale`` as the rate does, and parameters that are chosen whole keep their state at a refresh,
    so that density 1 is ``torch.optim.AdamW``.

    Args:
        model: its parameters' names are those that shards go by.
        lr: learning rate of the dense parameters.
        density: state-full share of each projected parameter, in [0, 1]; at 0 all of it is state-free.
        selection: ``columns``, ``rows``; ``randk`` (single coordinates; on a CPU several times AdamW's time);
            ``blockwise`` (whole parameters, that share of their number; what it keeps follows their sizes); ``svd``
            (leading singular vectors of the gradient at the refresh); ``random`` (a random semi-orthogonal
            projection).
        block_order: in which order ``blockwise`` takes the parameters.
        state_free: rule of the remainder.
        state_free_lr_scale: its learning rate relative to the parameter's; 0 leaves it where it is.
        refresh_interval: optimizer steps between changes of subspace; None keeps the first one.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        embeddings, head: rule of ``nn.Embedding`` weights, and of untargeted linears with as many outputs as an
            embedding has entries: ``full`` (AdamW), ``projected`` as the matrices, or ``free`` (state-free as a
            whole). Tied weights count as embeddings.
        norms: rule of all parameters of fewer than two dimensions: ``full`` or ``free``. Whatever is none of these
            and no matrix is ``full``.
        reduction: ``mean``: gradients are averaged by whoever runs the backward. ``majority_vote``: every rank brings
            its own gradients, in plain PyTorch without DDP; those of state-full coordinates are averaged, and the
            others' update is the sign of the sum over ranks of their gradients' signs, 0 at a tie, sent as one bit
            each, two on steps in which a rank has an exact zero among them. All ranks need gradients for the same
            parameters. This is not the sign of the mean gradient.
        matrix_lr_scale: learning rate of the matrices relative to ``lr``.
        target_modules: globs over module names, the matrices; default every linear inside the transformer blocks.
        param_groups: ``{"params": [globs over parameter names], **options}`` with ``lr``, ``betas``, ``eps`` or
            ``weight_decay``; the first match wins.
        seed: of selections and projections; the same on all process ranks.
        foreach: for AdamW's part, all parameters of a group at once; default on CUDA.

    Raises:
        ValueError: an option out of range, globs that match nothing, or ``majority_vote`` without process group.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        density: float = 0.25,
        selection: SelectionName = "columns",
        block_order: BlockOrder = "random",
        state_free: StateFree = "signSGD",
        state_free_lr_scale: float = 1.0,
        refresh_interval: int | None = 200,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        embeddings: Rule = "full",
        head: Rule = "full",
        norms: Literal["full", "free"] = "full",
        reduction: Reduction = "mean",
        matrix_lr_scale: float = 1.0,
        target_modules: Sequence[str] | None = None,
        param_groups: Sequence[dict[str, Any]] = (),
        seed: int = 0,
        foreach: bool | None = None,
    ) -> None:
        self.check_options(
            lr=lr,
            density=density,
            selection=selection,
            block_order=block_order,
            state_free=state_free,
            state_free_lr_scale=state_free_lr_scale,
            refresh_interval=refresh_interval,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            embeddings=embeddings,
            head=head,
            norms=norms,
            reduction=reduction,
            matrix_lr_scale=matrix_lr_scale,
        )
        if reduction == "majority_vote" and not dist.is_initialized():
            raise ValueError("reduction: 'majority_vote' found, which needs torch.distributed to be initialised")
        if reduction == "majority_vote" and (wrapper := next(wrappers_of(model), None)) is not None:
            raise ValueError(f"reduction: 'majority_vote' found, but {wrapper} averages the gradients before the vote")
        self.saves_traffic = reduction == "majority_vote"
        super().__init__(
            model,
            lr=lr,
            defaults={"betas": betas, "eps": eps, "weight_decay": weight_decay},
            matrix_lr_scale=matrix_lr_scale,
            target_modules=target_modules,
            param_groups=param_groups,
        )
        self.state_free: StateFree = state_free
        self.state_free_lr_scale = state_free_lr_scale
        self.refresh_interval = refresh_interval
        self.reduction: Reduction = reduction
        self.seed = seed
        self.foreach = foreach
        self.subspaces = Subspaces(
            model,
            self.targets,
            density=density,
            selection=selection,
            block_order=block_order,
            seed=seed,
            rules={"embeddings": embeddings, "head": head, "norms": norms},
        )
        self._projections = Projections(self.subspaces)
        self._slots: dict[Tensor, list[Slot]] = {}

    @staticmethod
    def check_options(**options: Any) -> None:
        """Check the options that need no model.

        Raises:
            ValueError: naming the option, what was found and what is allowed.
        """
        check_adam(options)
        check_number(options, "density", at_least=0.0)
        if options["density"] > 1.0:
            raise ValueError(f"density: {options['density']!r} found, a number of at most 1 is needed")
        check_number(options, "state_free_lr_scale", at_least=0.0)
        check_count(options, "refresh_interval", optional=True)
        check_choice(options, "selection", get_args(SelectionName))
        check_choice(options, "block_order", get_args(BlockOrder))
        check_choice(options, "state_free", get_args(StateFree))
        check_choice(options, "embeddings", get_args(Rule))
        check_choice(options, "head", get_args(Rule))
        check_choice(options, "norms", ("full", "free"))
        check_choice(options, "reduction", get_args(Reduction))
        selection, order, rule = options["selection"], options["block_order"], options["state_free"]
        if order != "random" and selection != "blockwise":
            raise ValueError(f"block_order: {order!r} found, but selection is {selection!r}, not 'blockwise'")
        if options["reduction"] == "majority_vote" and (rule != "signSGD" or selection in LOW_RANK):
            raise ValueError(
                f"reduction: 'majority_vote' found, which needs state_free 'signSGD' (found {rule!r}) and a selection"
                f" of coordinates (found {selection!r})"
            )

    def defer_to_engine(self, shards: ShardMap) -> None:
        """As the base class's.

        Raises:
            ValueError: with ``majority_vote``: an engine averages the gradients before the optimizer sees them.
        """
        if self.reduction == "majority_vote":
            raise ValueError(
                "reduction: 'majority_vote' found, but an engine averages the gradients before the optimizer sees"
                " them; it works in plain PyTorch only"
            )
        super().defer_to_engine(shards)
        self._slots = {}

    @property
    def num_refreshes(self) -> int:
        """Changes of subspace so far."""
        return 0 if self.refresh_interval is None else self.num_steps // self.refresh_interval

    def slots_of(self, flat: Tensor) -> list[Slot]:
        """Where the state of each of this rank's shards in ``flat`` is, in the current subspace."""
        if flat not in self._slots:
            slots, first = [], 0
            for shard in self.shards.shards_of(flat):
                selection = self.subspaces.select(shard.name, self.num_refreshes, flat.device)
                before = selection.before(shard.start)
                count = selection.before(shard.start + shard.length) - before
                resets = shard.name in self.subspaces.projected
                slots.append(Slot(shard, selection, before, first, count, resets))
                first += count
            self._slots[flat] = slots
        return self._slots[flat]

    def _state_of(self, flat: Tensor) -> dict[str, Any]:
        """The state of ``flat``, allocated if there is none."""
        state = self.state[flat]
        for key in _COUNTS:
            state.setdefault(key, 0)
        for key in _MOMENTS:
            if key not in state:
                count = sum(slot.count for slot in self.slots_of(flat))
                state[key] = torch.zeros(count, dtype=compute_dtype(flat), device=flat.device)
        return state

    def _forget_subspace(self) -> None:
        self._slots = {}
        self._projections.bases = {}

    @torch.no_grad()
    def after_step(self, learning_rates: Sequence[float]) -> None:
        """Count a finished step; when a refresh is due, change the subspace and start the projected moments again."""
        due = self.refresh_interval is not None and (self.num_steps + 1) % self.refresh_interval == 0
        old_slots = {flat: self.slots_of(flat) for flat, state in self.state.items() if due and "exp_avg" in state}
        super().after_step(learning_rates)
        if due:
            self._forget_subspace()
        for flat, slots in old_slots.items():
            state = self.state[flat]
            old = {key: state.pop(key) for key in _MOMENTS}
            state["since_refresh"] = 0
            new = self._state_of(flat)
            for before, after in zip(slots, self.slots_of(flat), strict=True):
                if not before.resets:
                    for key in _MOMENTS:
                        after.of(new[key]).copy_(before.of(old[key]))

    def _update(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        foreach = self.foreach if self.foreach is not None else flats[0].is_cuda
        together = foreach or self.shards.num_process_ranks > 1 or self.reduction == "majority_vote"
        for batch in [flats] if together else [[flat] for flat in flats]:
            self._update_batch(group, batch)

    def _update_batch(self, group: dict[str, Any], flats: Sequence[Tensor]) -> None:
        adam, coordinates, low_rank, compact = _Adam(), [], [], None
        for flat in flats:
            for key in _COUNTS:
                self._state_of(flat)[key] += 1
            for slot in self.slots_of(flat):
                (low_rank if slot.resets and self.subspaces.selection in LOW_RANK else coordinates).append(slot)
        writes = self._split_coordinates(coordinates, group, adam)
        if self.subspaces.selection in LOW_RANK:
            compact = self._projections.project(self.shards, flats, low_rank, refresh=self.num_refreshes)
            for slot in low_rank:
                # Adam's update of a zero, which no decay changes, is its update.
                update, gradient = compact.own(compact.update, slot), compact.own(compact.gradient, slot)
                adam.add(update, gradient, slot, self.state[slot.shard.flat], self._step_of(slot))
        adam.step(group, foreach=self.foreach)
        for slot, parts, parameter, chosen in writes:
            put_(parts, parameter, chosen)
            self._write_back(slot, parameter)
        if compact is not None:
            self._expand(compact, low_rank, group)

    def _step_of(self, slot: Slot) -> int:
        """The updates of this slot's moments, with the present one: at a refresh the projected ones' start again."""
        return self.state[slot.shard.flat]["since_refresh" if slot.resets else "step"]

    def _direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign() if self.state_free == "signSGD" else gradient

    def _state_free_step(self, parameter: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        lr = float(group["lr"])
        if group["weight_decay"]:
            parameter.mul_(1.0 - lr * group["weight_decay"])
        if self.state_free_lr_scale:
            parameter.add_(direction, alpha=-lr * self.state_free_lr_scale)

    def _write_back(self, slot: Slot, parameter: Tensor) -> None:
        seed = derive_seed(self.seed, self.num_steps, slot.shard.name)
        write_back(slot.shard.of(slot.shard.flat), parameter, seed=seed, position=slot.shard.position)

    def _split_coordinates(
        self, slots: Sequence[Slot], group: dict[str, Any], adam: "_Adam"
    ) -> list[tuple[Slot, list[Part], Tensor, Tensor]]:
        """Take the state-free step, and hand the state-full coordinates to ``adam``.

        Returns:
            What is to be written back after Adam's step: the parts, the shard of the parameter, the values.
        """
        writes = []
        gradients = [gradient_of(slot) for slot in slots]
        chosen = [slot.parts() for slot in slots]
        averaged, votes = [take(parts, g) for parts, g in zip(chosen, gradients, strict=True)], None
        if self.reduction == "majority_vote":
            averaged, votes = _vote(slots, chosen, gradients, averaged)
        for i, (slot, parts, gradient) in enumerate(zip(slots, chosen, gradients, strict=True)):
            parameter = widen(slot.shard.of(slot.shard.flat))
            values = take(parts, parameter)
            if slot.count < slot.shard.length:
                self._state_free_step(parameter, votes[i] if votes else self._direction(gradient), group)
            writes.append((slot, parts, parameter, values))
            adam.add(values, averaged[i], slot, self.state[slot.shard.flat], self._step_of(slot))
        return writes

    def _expand(self, compact: Compact, slots: Sequence[Slot], group: dict[str, Any]) -> None:
        """Take the step of the projected shards: Adam's update from its own space, the remainder state-free."""
        self._projections.sum_updates(self.shards, compact)
        for slot in slots:
            parameter = widen(slot.shard.of(slot.shard.flat))
            projected, update = self._projections.expand(compact, slot)
            self._state_free_step(parameter, self._direction(gradient_of(slot) - projected), group)
            parameter.add_(update)
            self._write_back(slot, parameter)

    def bytes_summed(self, itemsize: int = 4) -> dict[str, int]:
        """Bytes of the buffers that one process rank sums over all ranks, beside the averaging of gradients.

        With ``majority_vote``, those of the all-reduces and of its own part of the all-gathers, which replace the
        averaging; on a step without exact zeros.

        Args:
            itemsize: of the optimizer's arithmetic, in bytes: 4 unless parameters are fp64.

        Returns:
            ``step``: on every step; ``refresh``: in addition on the first step in a subspace. Where every rank holds
            all parameters whole, nothing is summed for ``svd`` and ``random``.
        """
        if self.subspaces.selection in LOW_RANK and self.shards.num_process_ranks > 1:
            return self._projections.bytes_summed(itemsize)
        step = 0
        if self.reduction == "majority_vote":
            for group in self.param_groups:
                slots = [slot for flat in group["params"] for slot in self.slots_of(flat)]
                count, total = sum(slot.count for slot in slots), sum(slot.shard.length for slot in slots)
                step += itemsize * (count + 1) + -(-(total - count) // 8)
        return {"step": step, "refresh": 0}

    def state_pieces(self, flat: Tensor) -> Iterable[StatePiece]:
        """The moments of the state-full coordinates; a piece of no elements for a shard that has none."""
        state = self._state_of(flat)
        for slot in self.slots_of(flat):
            for key in _MOMENTS:
                yield StatePiece(slot.shard.name, key, slot.before, slot.of(state[key]))

    def subspace_bytes(self) -> int:
        """Bytes of the bases of ``svd`` and ``random``."""
        return sum(basis.nbytes for basis in self._projections.bases.values())

    def subspace_state(self) -> dict[str, Any]:
        """The counters, what the subspaces follow from, and under ``tensors`` the bases that cannot be derived again.

        A basis of ``svd`` comes from the gradient of a step that is gone.
        """
        bases = self._projections.bases if self.subspaces.selection == "svd" else {}
        return {**super().subspace_state(), "options": self._options(), "tensors": dict(bases)}

    def _options(self) -> dict[str, Any]:
        return {**self.subspaces.describe(), "refresh_interval": self.refresh_interval}

    def _check_subspace_state(self, state: dict[str, Any]) -> None:
        super()._check_subspace_state(state)
        for key, own in self._options().items():
            saved = state["options"][key]
            if saved != own:
                what = "other rules for some parameters" if key == "rules" else f"{key} {saved!r}"
                raise ValueError(f"Frugal state: {what} found" + ("" if key == "rules" else f", {own!r} expected"))

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`subspace_state`; the moments are the caller's to restore, and start from zero.

        Raises:
            ValueError: it was saved by another type of optimizer or with other subspaces; nothing has changed then.
        """
        super().load_subspace_state(state)
        self._forget_subspace()
        self._projections.bases = dict(state["tensors"])
        for moments in self.state.values():
            for key in _MOMENTS:
                moments.pop(key, None)


@dataclass
class _Adam:
    """Arguments of torch's functional AdamW, gathered from many shards."""

    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def add(self, parameter: Tensor, gradient: Tensor, slot: Slot, state: dict[str, Any], step: int) -> None:
        if slot.count:
            self.parameters.append(parameter)
            self.gradients.append(gradient)
            self.exp_avgs.append(slot.of(state["exp_avg"]))
            self.exp_avg_sqs.append(slot.of(state["exp_avg_sq"]))
            self.steps.append(torch.tensor(step - 1.0))

    def step(self, group: dict[str, Any], *, foreach: bool | None) -> None:
        adamw(
            self.parameters,
            self.gradients,
            self.exp_avgs,
            self.exp_avg_sqs,
            [],
            self.steps,
            foreach=foreach,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _vote(
    slots: Sequence[Slot], chosen: Sequence[list[Part]], gradients: Sequence[Tensor], averaged: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The state-full coordinates' mean gradients, and the voted signs in the shards' shape, 0 at state-full ones."""
    free = []
    for slot, parts, gradient in zip(slots, chosen, gradients, strict=True):
        mask = torch.full_like(gradient, slot.count < slot.shard.length, dtype=torch.bool)
        put_(parts, mask, mask.new_zeros(slot.count))
        free.append(mask)
    means, votes = average_and_vote(averaged, [g[mask] for g, mask in zip(gradients, free, strict=True)])
    directions = [torch.zeros_like(gradient) for gradient in gradients]
    for direction, mask, vote in zip(directions, free, votes, strict=True):
        direction[mask] = vote
    return means, directions
