"""FRUGAL: Adam on a rotating part of the coordinates, signSGD or SGD on all others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.profiler import record_function

from ..engine_optimizer import keywords_of
from ..layers.wrappers import wrappers_of
from ..numerics.precision import compute_dtype, widen, write_back
from ..numerics.seeds import derive_seed
from ..sharded import ShardedOptimizer
from ..sharding.shards import ShardMap, StatePiece
from .coordinates import Part, put_, take
from .majority_vote import average_and_vote
from .options import FrugalOptions
from .projections import Compact, Projections, gradient_of
from .subspaces import LOW_RANK, Slot, Subspaces

_MOMENTS = ("exp_avg", "exp_avg_sq")
# Updates of a parameter, and of the moments that start again at a refresh.
_COUNTS = ("step", "since_refresh")


class Frugal(ShardedOptimizer[FrugalOptions]):
    """Adam on a subspace that changes every ``refresh_interval`` steps, a rule without state on the rest.

    Of experts stacked in one parameter, every matrix counts as a parameter here.

    Each projected parameter's gradient is split in two: the *state-full* part (chosen columns, rows or coordinates,
    whole matrices, or a low-rank projection) is updated by AdamW, the *state-free* remainder by ``signSGD`` or
    ``SGD``. All parameters change their subspace together, and the moments and step counts of the projected ones then
    start again. Decay acts on all coordinates, unless ``decay`` says otherwise. Moments are kept in fp32 for the
    state-full coordinates only, 8 bytes for each, and cut over process ranks as the parameters are; which coordinates
    they are is derived from ``seed``.
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
        options: the fields of :class:`~.options.FrugalOptions`, as keywords.

    Raises:
        ValueError: an option out of range, globs that match nothing, or ``majority_vote`` without process group.
    """

    type_name: ClassVar[str] = "Frugal"
    options_type = FrugalOptions

    @keywords_of(FrugalOptions)
    def __init__(self, model: nn.Module, options: FrugalOptions) -> None:
        self.saves_traffic = options.reduction == "majority_vote"
        if self.saves_traffic and not dist.is_initialized():
            raise ValueError("reduction: 'majority_vote' expected torch.distributed to be initialised")
        if self.saves_traffic and (wrapper := next(wrappers_of(model), None)) is not None:
            raise ValueError(
                f"reduction: expected 'mean', got 'majority_vote': {wrapper} averages the gradients before the vote"
            )
        super().__init__(model, options)
        self.subspaces = Subspaces(
            model,
            self.members,
            density=options.density,
            selection=options.selection,
            block_order=options.block_order,
            seed=options.seed,
            rules={"embeddings": options.embeddings, "head": options.head, "norms": options.norms},
        )
        self._projections = Projections(self.subspaces)
        self._slots: dict[Tensor, list[Slot]] = {}

    @classmethod
    def unsupported_in_engine(cls, options: FrugalOptions, *, sharded: bool) -> list[str]:
        problems = super().unsupported_in_engine(options, sharded=sharded)
        if options.reduction == "majority_vote":
            problems.append(
                "reduction: 'majority_vote' does not work with the engine, which averages gradients before the"
                " optimizer sees them; plain PyTorch without DDP is needed"
            )
        return problems

    def defer_to_engine(self, shards: ShardMap | None) -> None:
        """As the base class's.

        Raises:
            ValueError: with ``majority_vote``: an engine averages the gradients before the optimizer sees them.
        """
        if problems := self.unsupported_in_engine(self.options, sharded=shards is not None):
            raise ValueError(problems[0])
        super().defer_to_engine(shards)
        self._slots = {}

    @property
    def num_refreshes(self) -> int:
        """Changes of subspace so far."""
        return 0 if self.options.refresh_interval is None else self.num_steps // self.options.refresh_interval

    def slots_of(self, flat: Tensor) -> list[Slot]:
        """Where the state of each of this rank's shards in ``flat`` is, in the current subspace."""
        if flat not in self._slots:
            slots, first = [], 0
            for shard in self.shards.shards_of(flat):
                selection = self.subspaces.select(shard.name, self.num_refreshes, flat.device)
                place, resets = selection.place(shard), shard.name in self.subspaces.projected
                slots.append(Slot(shard, selection, place, first, resets))
                first += place.count
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
        due = self.options.refresh_interval is not None and (self.num_steps + 1) % self.options.refresh_interval == 0
        old_slots = {flat: self.slots_of(flat) for flat, state in self.state.items() if due and "exp_avg" in state}
        super().after_step(learning_rates)
        if due:
            with record_function("narrowgauge::refresh"):
                self._change_subspace(old_slots)

    def _change_subspace(self, old_slots: Mapping[Tensor, Sequence[Slot]]) -> None:
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
        foreach = self.options.foreach if self.options.foreach is not None else flats[0].is_cuda
        together = foreach or self.shards.is_cut or self.options.reduction == "majority_vote"
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
        adam.step(group, foreach=self.options.foreach)
        for slot, parts, parameter, chosen in writes:
            put_(parts, parameter, chosen)
            self._write_back(slot, parameter)
        if compact is not None:
            self._expand(compact, low_rank, group)

    def _step_of(self, slot: Slot) -> int:
        """The updates of this slot's moments, with the present one: at a refresh the projected ones' start again."""
        return self.state[slot.shard.flat]["since_refresh" if slot.resets else "step"]

    def _direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign() if self.options.state_free == "signSGD" else gradient

    def _state_free_step(self, parameter: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        lr = float(group["lr"])
        if group["weight_decay"] and self.options.decay == "all":
            parameter.mul_(1.0 - lr * group["weight_decay"])
        if self.options.state_free_lr_scale:
            parameter.add_(direction, alpha=-lr * self.options.state_free_lr_scale)

    def _write_back(self, slot: Slot, parameter: Tensor) -> None:
        seed = derive_seed(self.options.seed, self.num_steps, slot.shard.name)
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
        if self.options.reduction == "majority_vote":
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
        self._projections.sum_updates(self.shards, slots, compact)
        for slot in slots:
            parameter = widen(slot.shard.of(slot.shard.flat))
            projected, update = self._projections.expand(compact, slot)
            self._state_free_step(parameter, self._direction(gradient_of(slot) - projected), group)
            parameter.add_(update)
            self._write_back(slot, parameter)

    def bytes_summed(self, itemsize: int = 4, *, sharded: bool | None = None) -> dict[str, int]:
        """Bytes of the buffers that one process rank sums over all ranks, beside the averaging of gradients.

        With ``majority_vote``, those of the all-reduces and of its own part of the all-gathers, which replace the
        averaging; on a step without exact zeros.

        Args:
            itemsize: of the optimizer's arithmetic, in bytes: 4 unless parameters are fp64.
            sharded: whether parameters are cut over process ranks; default as they are now.

        Returns:
            ``step``: on every step; ``refresh``: in addition on the first step in a subspace. Where every rank holds
            all parameters whole, nothing is summed for ``svd`` and ``random``.
        """
        is_cut = sharded if sharded is not None else self.shards.is_cut
        if self.subspaces.selection in LOW_RANK and is_cut:
            return self._projections.bytes_summed(itemsize)
        step = 0
        if self.options.reduction == "majority_vote":
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
                place = slot.place
                yield StatePiece(slot.shard.name, key, place.start, slot.of(state[key]), place.shape, place.box)

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
        return {**self.subspaces.describe(), "refresh_interval": self.options.refresh_interval}

    def _check_subspace_state(self, state: dict[str, Any]) -> None:
        super()._check_subspace_state(state)
        for key, own in self._options().items():
            saved = state["options"][key]
            if saved != own:
                found = "other rules for some parameters" if key == "rules" else f"{saved!r}"
                raise ValueError(f"Frugal state: expected {key}{'' if key == 'rules' else f' {own!r}'}, got {found}")

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
