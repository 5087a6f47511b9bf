"""Mixtures' experts in the form that transformers keeps them in: their matrices stacked in two parameters.

``gate_up_proj`` (or ``up_proj``) and ``down_proj`` become compact units of the module, whose ``forward`` is then one of
ours: tokens are sorted by expert, and each parameter is one :mod:`.grouped_linear`. What is done between the two is
asked of the module.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .compact import CompactModule, compact_class
from .contents import has_no_contents
from .grouped_linear import Runs, dense_grouped_linear
from .shape import whole_shape
from .stacked_weight import StackedProjected, StackedSelected, StackedWeight
from .unit import CompactUnit, Side


class CompactExperts(CompactModule):
    """An experts module, some or all of whose stacked matrices are compact.

    Attributes:
        plain: the class of the module it was made from.
        stacked: the units by the names of their weights.
        is_transposed: matrices are inputs times outputs.
    """

    stacked: dict[str, StackedWeight]
    is_transposed: bool

    def __init_subclass__(cls) -> None:
        """Of a class that is made for modules: what it computes with, the numbers of experts' tokens, is other in every
        step, and torch.compile would compile it again and again.
        """
        super().__init_subclass__()
        if "plain" in vars(cls):
            cls.forward = torch.compiler.disable(cls.forward)  # pyright: ignore[reportAttributeAccessIssue]

    def compact_units(self) -> Sequence[CompactUnit]:
        return tuple(self.stacked.values())

    def release(self, unit: StackedWeight) -> None:
        """Forget a unit; without any this is the plain module again."""
        del self.stacked[unit.weight_key]
        if not self.stacked:
            del self.stacked
            self.__class__ = self.plain  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of the class this was made from: hidden states ``(tokens, width)``, each token's experts and their weights,
        both ``(tokens, k)``. Experts are numbered; a number above the last one stands for none.
        """
        given = dict(zip(arguments_of(self.plain), args, strict=False)) | kwargs
        hidden, chosen, weights = (given[name] for name in arguments_of(self.plain))
        own: Any = self
        runs, token, slot = sort_by_expert(chosen, len(own.down_proj))
        x = hidden.index_select(0, token)
        y = self._product("gate_up_proj" if own.has_gate else "up_proj", x, runs)
        y = self._product("down_proj", own._apply_gate(y) if own.has_gate else own.act_fn(y), runs)
        y = y * weights[token, slot, None]
        return torch.zeros_like(hidden).index_add_(0, token, y.to(hidden.dtype))

    def _product(self, key: str, x: Tensor, runs: Runs) -> Tensor:
        bias, unit = getattr(self, f"{key}_bias", None), self.stacked.get(key)
        if unit is None:
            return dense_grouped_linear(x, getattr(self, key), bias, runs, transposed=self.is_transposed)
        return unit.forward(x, bias, runs, unit.compute_dtype(x))


class CompactLlama4Experts(CompactExperts):
    """Llama 4's, which are given the hidden states once for each expert, in the experts' order."""

    is_transposed = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """
        Args:
            hidden_states: ``(experts * tokens, width)``.
        """
        own: Any = self
        tokens = hidden_states.shape[0] // len(own.down_proj)
        runs = [(e, e * tokens, (e + 1) * tokens) for e in range(len(own.down_proj)) if tokens]
        gate, up = self._product("gate_up_proj", hidden_states, runs).chunk(2, dim=-1)
        return self._product("down_proj", up * own.act_fn(gate), runs)


class CompactSortedExperts(CompactExperts):
    """JetMoE's, one linear layer for each expert, which are given rows that are sorted by expert already."""

    is_transposed = False

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """
        Args:
            inputs: ``(rows, inputs)``.
            expert_size: how many rows each expert has.
        """
        ends = list(accumulate(expert_size, initial=0))
        runs = [(e, first, last) for e, (first, last) in enumerate(pairwise(ends)) if last > first]
        return self._product("weight", inputs, runs)


@cache
def arguments_of(plain: type[nn.Module]) -> tuple[str, ...]:
    """The names of its ``forward``'s arguments."""
    return tuple(inspect.signature(plain.forward).parameters)[1:]


def sort_by_expert(chosen: Tensor, num_experts: int) -> tuple[Runs, Tensor, Tensor]:
    """The tokens of each expert, in the order in which a loop over the experts would meet them.

    Args:
        chosen: ``(tokens, k)``, experts' numbers.

    Returns:
        The runs of rows, and for each row its token and which of the token's choices it is. Where there are no contents
        every expert has as many.
    """
    experts, order = chosen.t().reshape(-1).sort(stable=True)
    if has_no_contents(chosen):
        ends = [chosen.numel() * (expert + 1) // num_experts for expert in range(num_experts)]
    else:
        ends = torch.searchsorted(experts, torch.arange(num_experts, device=experts.device), right=True).tolist()
    runs = [(e, first, last) for e, (first, last) in enumerate(zip([0, *ends], ends, strict=False)) if last > first]
    order = order[: ends[-1]]
    return runs, order % chosen.shape[0], order // chosen.shape[0]


@dataclass(frozen=True)
class StackedMatrices:
    """A parameter of a module, matrices stacked, that can become compact.

    Attributes:
        module: the module.
        key: the parameter's name in it.
        transposed: a matrix is inputs times outputs.
    """

    module: nn.Module
    key: str
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.key)

    @property
    def num_matrices(self) -> int:
        return whole_shape(self.weight)[0]

    @property
    def outputs_and_inputs(self) -> tuple[int, int]:
        _, a, b = whole_shape(self.weight)
        return (b, a) if self.transposed else (a, b)

    def to_selected(self, *, side: Side, index: Tensor, contiguous: bool, shared: None = None) -> CompactUnit:
        """As :meth:`.SelectedLinear.convert`; the choice is the same for all experts."""
        raise NotImplementedError

    def to_projected(self, **bases: Any) -> CompactUnit:
        """As :meth:`.ProjectedLinear.convert`; dense bases have a first dimension of experts."""
        raise NotImplementedError


@dataclass(frozen=True)
class ExpertsMatrices(StackedMatrices):
    """Those of an experts module.

    Attributes:
        experts: the class that the module becomes.
    """

    experts: type[CompactExperts]

    def to_selected(self, *, side: Side, index: Tensor, contiguous: bool, shared: None = None) -> StackedWeight:
        own = {"transposed": self.transposed, "side": side, "index": index, "contiguous": contiguous}
        return self._added(StackedSelected.make(self._owner(), self.key, **own))

    def to_projected(self, **bases: Any) -> StackedWeight:
        return self._added(StackedProjected.make(self._owner(), self.key, transposed=self.transposed, **bases))

    def _owner(self) -> CompactExperts:
        module = self.module
        if not isinstance(module, CompactExperts):
            module.__class__ = compact_class(self.experts, type(module))
            assert isinstance(module, CompactExperts)
            module.stacked = {}
        return module

    def _added(self, unit: StackedWeight) -> StackedWeight:
        self._owner().stacked[self.key] = unit
        return unit


class HasStackedMatrices(nn.Module):
    """A module that says itself which of its parameters are stacked matrices that can become compact."""

    def stacked_matrices(self) -> Sequence[StackedMatrices]:
        raise NotImplementedError
