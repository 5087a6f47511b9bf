"""Megatron's parallel linears with a frozen weight, whose weights are trained through compact parameters.

Everything but the product itself stays Megatron's: the two classes override the one method that both ``forward`` call.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from narrowgauge.optimizers.layers.compact import CompactModule
from narrowgauge.optimizers.layers.unit import CompactUnit

from .parallel_weight import CompactParallelWeight
from .product import Product, gradients_of


class Held(Protocol):
    """A weight in a compact parallel layer.

    Attributes:
        parameter: the compact one.
        trained: that, or what of it belongs to the layer.
        probe: as of :class:`~narrowgauge.optimizers.layers.unit.CompactUnit`.
    """

    @property
    def parameter(self) -> nn.Parameter: ...
    @property
    def trained(self) -> Tensor: ...
    @property
    def main_grad(self) -> Tensor | None:
        """Where Megatron adds up the gradient of ``trained``."""
        ...

    probe: Tensor | None

    def note_call(self) -> None:
        """A forward that uses it has run."""
        ...

    def fold(self) -> None:
        """Write the compact values over those of the layer's weight."""
        ...

    def product(self) -> Product:
        """How the gradient of ``trained`` is made."""
        ...

    def probe_product(self) -> Product:
        """How what the probe observes is made."""
        ...


@dataclass(frozen=True)
class _Plan:
    """What a forward and its backward do.

    Attributes:
        products: those of the compact parameters, then those of the probes.
        held: whose compact parameters they are.
        allreduce_dgrad, sequence_parallel: as Megatron's.
        group: the tensor-parallel ranks.
    """

    products: list[Product]
    held: Sequence[Held]
    allreduce_dgrad: bool
    sequence_parallel: bool
    group: dist.ProcessGroup


class _CompactParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan, *trained: Tensor) -> Tensor:
        # Under sequence parallelism of this rank's part of the sequence only.
        kept = {product.key: product.keep for product in plan.products}
        ctx.save_for_backward(weight, *(keep(x) for keep in kept.values()))
        ctx.plan, ctx.keys, ctx.has_bias = plan, list(kept), bias is not None
        ctx.dtypes = [tensor.dtype for tensor in trained]
        whole = _gathered(x, plan.group)[0] if plan.sequence_parallel else x
        y = whole.matmul(weight.t())
        return y if bias is None else y + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y,) = grad_outputs
        weight, *parts = ctx.saved_tensors
        plan: _Plan = ctx.plan
        # The order of Megatron's own backward, so that communication overlaps with the products.
        gathers = []
        if plan.sequence_parallel:
            gathers = [_gathered(part, plan.group, async_op=True) for part in parts]
            parts = [whole for whole, _ in gathers]
        grad_x, reduction = grad_y.matmul(weight) if ctx.needs_input_grad[0] else None, None
        for _, gather in gathers:
            gather.wait()
        if grad_x is not None and plan.allreduce_dgrad:
            reduction = dist.all_reduce(grad_x, group=plan.group, async_op=True)
        elif grad_x is not None and plan.sequence_parallel:
            whole, grad_x = grad_x, grad_x.new_empty((grad_x.shape[0] // plan.group.size(), *grad_x.shape[1:]))
            reduction = dist.reduce_scatter_tensor(grad_x, whole, group=plan.group, async_op=True)
        grad_y_2d = grad_y.reshape(-1, grad_y.shape[-1])
        kept = {key: part.reshape(-1, part.shape[-1]) for key, part in zip(ctx.keys, parts, strict=True)}
        gradients = _trained_gradients(plan, grad_y_2d, kept, ctx.dtypes)
        grad_bias = grad_y_2d.sum(0) if ctx.has_bias else None
        if reduction is not None:
            reduction.wait()
        return grad_x, None, grad_bias, None, *gradients


def _gathered(x: Tensor, group: dist.ProcessGroup, *, async_op: bool = False) -> tuple[Tensor, Any]:
    """All ranks' parts of a sequence, and the handle to wait for."""
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    return whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=async_op)


def _trained_gradients(
    plan: _Plan, grad_y: Tensor, kept: dict[Hashable, Tensor], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """The gradients of compact parameters and probes.

    Where Megatron's DDP adds gradients up in fp32 and the parameters are narrower, they are added there at once,
    without rounding in between, and what is returned stands for them, as after Megatron's own fused accumulation.
    """
    mains = [own.main_grad for own in plan.held]
    added = [main is not None and main.itemsize > d.itemsize for main, d in zip(mains, dtypes, strict=False)]
    wide = added + [False] * (len(plan.products) - len(added))
    found = gradients_of(plan.products, grad_y, kept, wide)
    for number, (own, main) in enumerate(zip(plan.held, mains, strict=True)):
        if main is not None and added[number]:
            main.add_(found[number].view_as(main))
            parameter: Any = own.parameter
            parameter.grad_added_to_main_grad = True
            found[number] = torch.empty_like(found[number], dtype=dtypes[number])
    return [gradient.to(dtype) for gradient, dtype in zip(found, dtypes, strict=True)]


class CompactParallelLinear(CompactModule):
    """What the two compact layers have in common.

    Attributes:
        held: the weights in the layer, in order; not children.
        plan: of the present subspaces; made when it is needed.
        is_stale: compact values are newer than the weight.
    """

    held: Sequence[Held]
    plan: list[Product] | None
    is_stale: bool
    weight: nn.Parameter
    tp_group: Any

    def _become_compact(self, held: Sequence[Held]) -> None:
        self.__dict__["held"] = list(held)
        self.weight.requires_grad_(False)
        self.plan, self.is_stale = None, False

    @torch.no_grad()
    def fold(self) -> None:
        """Write compact values over those of the weight."""
        for own in self.held:
            own.fold()
        self.is_stale = False

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        gradient_accumulation_fusion: bool = False,
        grad_output_buffer: Any = None,
        wgrad_deferral_limit: Any = None,
    ) -> Tensor:
        if self.is_stale:
            self.fold()
        probes = [own for own in self.held if own.probe is not None]
        products = self._products() + [own.probe_product() for own in probes]
        plan = _Plan(products, self.held, allreduce_dgrad, sequence_parallel, tp_group or self.tp_group)
        trained = [own.trained for own in self.held] + [own.probe for own in probes if own.probe is not None]
        return _CompactParallel.apply(input, weight, bias, plan, *trained)

    def _products(self) -> list[Product]:
        if self.plan is None:
            for own in self.held:
                own.note_call()
            self.plan = [own.product() for own in self.held]
        return self.plan

    def compact_units(self) -> Sequence[CompactUnit]:
        return [own for own in self.held if isinstance(own, CompactParallelWeight)]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        none = self.weight.detach().new_empty(0)
        found = fn(none)
        if (found.dtype, found.device) == (none.dtype, none.device):
            return self
        raise NotImplementedError("a compact parallel layer is not moved: its compact values lie in Megatron's buffers")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.is_stale:
            self.fold()
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        for key in [key for key in destination if key.startswith(f"{prefix}compact_")]:
            del destination[key]


class CompactColumnParallelLinear(CompactParallelLinear, ColumnParallelLinear):
    """A ``ColumnParallelLinear`` whose weights are compact."""


class CompactRowParallelLinear(CompactParallelLinear, RowParallelLinear):
    """A ``RowParallelLinear`` whose weight is compact."""


_COMPACT: dict[type[nn.Module], type[CompactParallelLinear]] = {
    ColumnParallelLinear: CompactColumnParallelLinear,
    RowParallelLinear: CompactRowParallelLinear,
}


def is_parallel_linear(module: nn.Module) -> bool:
    """Whether it can become compact."""
    return type(module) in _COMPACT


def train_compact(layer: nn.Module, held: Sequence[Held]) -> None:
    """Turn a parallel layer, all of whose weights are compact, into one that trains them. Before Megatron's DDP."""
    layer.__class__ = _COMPACT[type(layer)]
    assert isinstance(layer, CompactParallelLinear)
    layer._become_compact(held)


def become_compact(layer: nn.Module, held: Sequence[CompactParallelWeight]) -> None:
    """As :func:`train_compact`, for a layer that has the compact parameters itself."""
    train_compact(layer, held)
    for number, own in enumerate(held):
        # Megatron waits for gathered parameters before the forward of the module that has them.
        layer.register_parameter(f"compact_{number}", own.compact)
