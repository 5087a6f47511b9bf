"""Muon and NorMuon for compact parameters, with AdamW for all others."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..numerics.orthogonal import orthogonalized
from ..sharding.shards import ShardMap, StatePiece
from .matrices import CutShards, Key, Matrices, Plan, make_plan

MOMENTUM, NEURONS = "momentum_buffer", "neuron_avg_sq"
# Added to the roots of the neurons' second moments.
_EPS = 1e-10
# The root mean square of AdamW's updates, after Moonshot.
_RMS = 0.2

AdjustRate = Literal["original", "match_rms_adamw"]


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for the groups of ``kind`` ``compact`` and ``matrix``, and AdamW for the ``dense`` ones.

    A matrix ``W`` of gradient ``G``, ``outputs x inputs``: ``M <- mu M + (1 - mu) G``, ``U = mu M + (1 - mu) G``
    (``nesterov``) or ``M``, ``O`` = :func:`~.orthogonal.orthogonalized` ``U``, ``W <- (1 - lr decay) W - lr a O``. The
    factor ``a`` is that of ``torch.optim.Muon``: ``sqrt(max(1, outputs / inputs))`` (``original``, Jordan et al.) or
    ``0.2 sqrt(max(outputs, inputs))`` (``match_rms_adamw``; Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv
    2502.16982, Section 2.2), of the shape of the compact matrix.

    With ``neuron_beta`` NorMuon (Li, Liu, Liang, Chen, Zhao 2025, "NorMuon: Making Muon more efficient and scalable",
    arXiv 2510.05491, Algorithm 1): each row of ``O`` is divided by the root of the running mean of its mean square, and
    the whole brought to a root mean square of 0.2 (``match_rms_adamw``), or back to the norm of ``O`` and multiplied by
    the factor above (``original``, as in the authors' code).

    A matrix without gradient is left as it is, as by torch; of one whose gradient is zero, as that of an expert without
    tokens, the momentum decays, and it moves by its weight decay only: orthogonalized, any rest of momentum would be a
    whole step.

    Where ZeRO has cut a matrix, its pieces of ``U`` go to the rank that has the most of it, and those of ``O`` back.
    The momentum is cut as the gradient is; a matrix's second moments are on the rank that updates it.

    Attributes:
        matrices: in the parameters of the groups that are not dense, by name.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        adam: Mapping[str, Any],
        matrices: Mapping[str, Matrices],
        shards: Callable[[], ShardMap],
        momentum: float,
        nesterov: bool,
        adjust_lr_fn: AdjustRate,
        neuron_beta: float | None,
        dtype: torch.dtype | None,
    ) -> None:
        """
        Args:
            groups: with a ``kind`` each.
            adam: ``torch.optim.AdamW``'s arguments, for the dense groups.
            matrices: in the parameters of the other groups, by name.
            shards: how these are cut; asked once, at the first step or by :meth:`place`.
            dtype: of the orthogonalization.
        """
        self._adamw = torch.optim.AdamW([{"params": []}], **adam)
        super().__init__(groups, self._adamw.defaults)
        self.matrices, self._make_shards, self._shards = dict(matrices), shards, None
        self._momentum, self._nesterov, self._neuron_beta = momentum, nesterov, neuron_beta
        self._adjust, self._dtype = adjust_lr_fn, dtype
        self._plans: dict[Tensor, Plan] = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which rounds what it loads to the parameters' dtype: second moments are wider than bf16's."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, flat in zip(numbers, (p for g in self.param_groups for p in g["params"]), strict=True):
            if (saved := state_dict["state"].get(number, {}).get(NEURONS)) is not None:
                self.state[flat][NEURONS] = {key: value.to(flat.device, copy=True) for key, value in saved.items()}

    def place(self, flats: Sequence[Tensor]) -> None:
        """Find out who updates what, of the tensors that an engine steps. Collective."""
        self._shards, self._plans = None, {}
        for flat in flats:
            self._plan(flat)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.param_groups = [group for group in self.param_groups if group["kind"] == "dense"]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            for flat in group["params"] if group["kind"] != "dense" else ():
                if flat.grad is not None:
                    self._update(flat, flat.grad, lr=float(group["lr"]), decay=group["weight_decay"])
        return loss

    def _update(self, flat: Tensor, gradient: Tensor, *, lr: float, decay: float) -> None:
        state, plan = self.state[flat], self._plan(flat)
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        momentum: Tensor = state[MOMENTUM]
        momentum.lerp_(gradient, 1.0 - self._momentum)
        direction = gradient.lerp(momentum, self._momentum) if self._nesterov else momentum
        flat.mul_(1.0 - lr * decay)
        # Of masters in the CPU's memory, where the iteration would take many times as long.
        device = self._shards.device if isinstance(self._shards, CutShards) else flat.device
        for key in plan.whole:
            piece = plan.own[key]
            has_gradient = piece.of(gradient).any()
            change = self._change(key, piece.of(direction).to(device), has_gradient, state)
            self._add(key, piece.of(flat), change.reshape(-1), lr)
        if plan.cut:
            changes = self._changes_of_cut(plan, gradient, direction, state)
            for key, change in changes.items():
                self._add(key, plan.own[key].of(flat), change, lr)

    def _add(self, key: Key, values: Tensor, change: Tensor, lr: float) -> None:
        values.add_(change.to(values.device), alpha=-lr * self._factor(self.matrices[key.name]))

    def _changes_of_cut(
        self, plan: Plan, gradient: Tensor, direction: Tensor, state: dict[str, Any]
    ) -> dict[Key, Tensor]:
        """The changes of this rank's pieces of cut matrices. Collective."""
        shards = self._shards
        assert isinstance(shards, CutShards)
        own, ranks = shards.rank, range(shards.size)
        # To each rank the pieces that it puts together, and after each whether its gradient has an entry.
        to = [[k for k, rank in plan.cut.items() if rank == other != own and k in plan.own] for other in ranks]
        here = [k for k, rank in plan.cut.items() if rank == own]
        out_of = [[k for k in here if plan.held[k][other][1] and other != own] for other in ranks]
        wide = torch.promote_types(direction.dtype, torch.float32)
        out = [
            part
            for keys in to
            for k in keys
            for part in (plan.own[k].of(direction).to(wide), plan.own[k].of(gradient).any().to(wide).view(1))
        ]
        sent = [sum(plan.own[k].length + 1 for k in keys) for keys in to]
        received = [sum(plan.held[k][other][1] + 1 for k in out_of[other]) for other in ranks]
        came = shards.exchange(torch.cat([direction.new_empty(0, dtype=wide), *out]), sent=sent, received=received)
        whole = {k: came.new_zeros(self.matrices[k.name].size) for k in here}
        has_gradient = {k: came.new_zeros(()) for k in here}
        for k in here:
            piece = plan.own[k]
            whole[k][piece.start : piece.start + piece.length] = piece.of(direction).to(came)
            has_gradient[k] += piece.of(gradient).any().to(came)
        position = 0
        for other in ranks:
            for k in out_of[other]:
                start, length = plan.held[k][other]
                whole[k][start : start + length] = came[position : position + length]
                has_gradient[k] += came[position + length]
                position += length + 1
        changes = {k: self._change(k, whole[k], has_gradient[k] > 0, state).reshape(-1) for k in here}
        back = []
        for other in ranks:
            for k in out_of[other]:
                start, length = plan.held[k][other]
                back.append(changes[k][start : start + length])
        returned = shards.exchange(
            torch.cat([came.new_empty(0, dtype=self._dtype or wide), *back]),
            sent=[sum(plan.held[k][other][1] for k in out_of[other]) for other in ranks],
            received=[sum(plan.own[k].length for k in keys) for keys in to],
        )
        found = {k: changes[k][plan.own[k].start : plan.own[k].start + plan.own[k].length] for k in here}
        lengths = {k: plan.own[k].length for keys in to for k in keys}
        return found | dict(zip(lengths, returned.split(list(lengths.values())), strict=True))

    def _change(self, key: Key, direction: Tensor, has_gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """What is subtracted from a matrix, but for rate and factor, of the matrix's shape.

        Args:
            direction: of the whole matrix, flat.
        """
        spec = self.matrices[key.name]
        matrix = direction.view(spec.rows, spec.columns)
        change = orthogonalized(matrix.t() if spec.transposed else matrix, dtype=self._dtype)
        if self._neuron_beta is not None:
            change = self._normalized(change, self._neurons(key, state, direction), has_gradient)
        change = change * has_gradient.to(change)
        return change.t() if spec.transposed else change

    def _normalized(self, change: Tensor, neurons: Tensor, has_gradient: Tensor) -> Tensor:
        """Each row by the root of its second moment, which is brought up to date; see the class."""
        assert self._neuron_beta is not None
        wide = change.to(torch.promote_types(change.dtype, torch.float32))
        moments = neurons.to(wide)
        moments = torch.where(
            has_gradient.to(wide.device), moments.lerp(wide.square().mean(1), 1.0 - self._neuron_beta), moments
        )
        neurons.copy_(moments)
        divided = wide / (moments.sqrt() + _EPS)[:, None]
        norm = divided.norm()
        # With the factor of a root mean square of 1, the norm of the whole is the root of the number of elements.
        size = math.sqrt(wide.numel()) if self._adjust == "match_rms_adamw" else wide.norm()
        return (divided * torch.where(norm > 0.0, size / norm, 0.0)).to(change.dtype)

    def _factor(self, spec: Matrices) -> float:
        outputs, inputs = spec.outputs_and_inputs
        if self._adjust == "original":
            return math.sqrt(max(1.0, outputs / inputs))
        return _RMS * (1.0 if self._neuron_beta is not None else math.sqrt(max(outputs, inputs)))

    def _neurons(self, key: Key, state: dict[str, Any], like: Tensor) -> Tensor:
        """The second moments of a matrix's outputs, ``(outputs,)``; zero where there were none."""
        outputs, _ = self.matrices[key.name].outputs_and_inputs
        found = state.setdefault(NEURONS, {})
        wide = torch.promote_types(like.dtype, torch.float32)
        return found.setdefault(f"{key.name}[{key.number}]", torch.zeros(outputs, dtype=wide, device=like.device))

    def neuron_pieces(self, flat: Tensor) -> Iterator[StatePiece]:
        """The second moments of the matrices in ``flat``, for checkpoints; none of those that another rank keeps."""
        if self._neuron_beta is None or not self._is_of_matrices(flat):
            return
        plan, state = self._plan(flat), self.state[flat]
        own = self._shards.rank if isinstance(self._shards, CutShards) else 0
        for key in (*plan.whole, *plan.cut):
            spec = self.matrices[key.name]
            outputs, _ = spec.outputs_and_inputs
            is_here = plan.cut.get(key, own) == own
            neurons = self._neurons(key, state, flat) if is_here else flat.new_empty(0)
            yield StatePiece(key.name, NEURONS, key.number * outputs, neurons, (spec.count * outputs,))

    def bytes_of_state(self, element: int) -> int:
        """Of all matrices' momentum and second moments.

        Args:
            element: bytes of an element of what is stepped.
        """
        momentum = element * sum(spec.count * spec.size for spec in self.matrices.values())
        if self._neuron_beta is None:
            return momentum
        return momentum + element * sum(s.count * s.outputs_and_inputs[0] for s in self.matrices.values())

    def _is_of_matrices(self, flat: Tensor) -> bool:
        if flat in self._plans:
            return True
        return any(flat is p for g in self.param_groups if g["kind"] != "dense" for p in g["params"])

    def _plan(self, flat: Tensor) -> Plan:
        if self._shards is None:
            self._shards = self._make_shards()
        if flat not in self._plans:
            self._plans[flat] = make_plan(flat, self.matrices, self._shards)
        return self._plans[flat]
