"""Modules that have compact units: to the outside they stay what they were made from."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sampling import Kept, SampledInputs
from .unit import CompactUnit, ProbeKind, Side
from .watch import unwatch


class CompactModule(nn.Module):
    """A module with compact units.

    Made from an existing one in place, so that names, hooks and references to it survive. ``state_dict`` holds what it
    did, the weights folded, and loading plain weights rebuilds the compact values.

    Attributes:
        plain: the class of the module it was made from.
    """

    plain: ClassVar[type[nn.Module]]

    def compact_units(self) -> Sequence[CompactUnit]:
        """Those whose weights are parameters of this module itself."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        agreed = [unit for unit in self.compact_units() if unit.watch is None or unit.watch.is_unchanged(unit)]
        super()._apply(fn, recurse)
        for unit in self.compact_units():
            unit.follow_weight()
        for unit in agreed:
            unit.note()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for unit in self.compact_units():
            if unit.watch is not None:
                unit.watch.compare(unit)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for unit in self.compact_units():
            del destination[prefix + unit.compact_key]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for unit in self.compact_units():
            if prefix + unit.compact_key in missing_keys:
                missing_keys.remove(prefix + unit.compact_key)
            unit.weight.requires_grad_(False)
            if unit.is_whole() and prefix + unit.weight_key in state_dict:
                unit.take_loaded_weight()


def compact_units(model: nn.Module) -> Iterator[CompactUnit]:
    """Those of all modules of a model."""
    for module in model.modules():
        if isinstance(module, CompactModule):
            yield from module.compact_units()


class CompactWeight(CompactUnit, CompactModule):
    """A layer that is one compact unit: its weight is called ``weight``."""

    def compact_units(self) -> Sequence[CompactUnit]:
        return (self,)

    def holds_weight(self) -> bool:
        return self.weight_key in self._parameters

    def _become_compact(self, shape: tuple[int, int], side: Side) -> None:
        self.side, self.folds_at_use, self.probe, self.omega = side, False, None, None
        self.weight.requires_grad_(False)
        self.compact = nn.Parameter(torch.empty(shape, dtype=self.weight.dtype, device=self.weight.device))

    def revert(self) -> None:
        del self.compact, self.side, self.folds_at_use, self.probe, self.omega
        for key in self.subspace():
            delattr(self, key)
        unwatch(self)
        for key in ("watch", "was_called"):
            self.__dict__.pop(key, None)
        self.weight.requires_grad_(True)
        self.__class__ = self.plain  # pyright: ignore[reportAttributeAccessIssue]


class Quantizer(Protocol):
    """How a linear layer multiplies by its weight in fewer bits; without autograd, but for :meth:`activations`."""

    def activations(self, x: Tensor) -> Tensor:
        """What the layer computes with in the place of its input, with a gradient."""
        ...

    def product(self, x: Tensor, weight: Tensor, *, keeps: bool) -> Tensor:
        """``x W^T`` for ``(..., n)`` and a whole weight ``(m, n)``.

        Args:
            keeps: the weight stays where it is until it is changed: what is made of it may be kept until then.
        """
        ...

    def input_gradient(self, grad_y: Tensor, weight: Tensor, *, keeps: bool) -> Tensor:
        """``dY W``."""
        ...

    def weight_gradient(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """``dY^T X`` for ``(b, m)`` and ``(b, n)``; only asked for where the whole weight is trained."""
        ...


class CompactLinear(CompactWeight, nn.Linear):
    """A compact ``nn.Linear``, for ``y = x W^T + b``: ``G = dY^T X``.

    Attributes:
        transposed: the layer is ``y = x W + b`` instead, with a weight of inputs times outputs: ``G = X^T dY``.
        quantizer: of the layer that it was made from; its gradients go straight through.
        sampled: of the layer that it was made from; what of the input is kept for the gradient of ``compact``.
    """

    plain: ClassVar[type[nn.Module]] = nn.Linear
    transposed: bool = False
    quantizer: Quantizer | None = None
    sampled: SampledInputs | None = None

    def quantized(self, input: Tensor) -> Tensor:
        """What the layer computes with in the place of its input."""
        return input if self.quantizer is None else self.quantizer.activations(input)

    def _sampled_input(self, input: Tensor, key: Hashable, read: Callable[[], Tensor]) -> Kept | None:
        """What is kept of what ``read`` makes of the input; None where all is, or nothing is trained."""
        if self.sampled is None or not (self.training or torch.is_grad_enabled()):
            return None
        return self.sampled.keep(input, key, read)

    def _probe_arguments(
        self, input: Tensor, compute_dtype: torch.dtype
    ) -> tuple[Tensor | None, ProbeKind | None, Tensor | None, Tensor | None]:
        """The probe, its kind, what it needs of the input in backward, and its directions; nothing without one."""
        if self.probe is None:
            return None, None, None, None
        x_2d = input.detach().reshape(-1, input.shape[-1]).to(compute_dtype)
        kind: ProbeKind = self.probe_kind
        if self.transposed and kind != "full":
            # Of W^T.
            kind = "rows" if kind == "columns" else "columns"
        if kind == "rows":
            assert self.omega is not None
            x_2d = x_2d @ self.omega.to(x_2d.dtype)
        return self.probe, kind, x_2d, self.omega


@cache
def compact_class(compact: type[CompactModule], plain: type[nn.Module]) -> Any:
    """``compact`` for layers of the type ``plain``, of which they stay instances."""
    if getattr(compact, "plain", None) is plain:
        return compact
    members = {"plain": plain, "__reduce__": _reduce_made}
    return type(f"{compact.__name__}Of{plain.__name__}", (compact, plain), members)


def _reduce_made(self: CompactModule) -> Any:
    """For pickle and copy, which find a class by the module that it stands in."""
    compact = next(base for base in type(self).__bases__ if issubclass(base, CompactModule))
    return _new_made, (compact, self.plain), self.__dict__.copy()


def _new_made(compact: type[CompactModule], plain: type[nn.Module]) -> Any:
    made = compact_class(compact, plain)
    return made.__new__(made)


def keep_dtypes(
    ctx: Any,
    x: Tensor,
    bias: Tensor | None,
    compact: Tensor,
    probe: Tensor | None,
    probe_kind: ProbeKind | None,
    transposed: bool,
    quantizer: Quantizer | None,
    keeps: bool,
) -> None:
    """In the forward of a compact linear layer's autograd function: what its gradients have to be."""
    ctx.transposed, ctx.quantizer, ctx.keeps = transposed, quantizer, keeps
    ctx.x_dtype, ctx.compact_dtype = x.dtype, compact.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.probe_kind, ctx.probe_dtype = probe_kind, None if probe is None else probe.dtype


def other_gradients(
    ctx: Any, grad_y: Tensor, grad_y_2d: Tensor, weight: Tensor, probe_input: Tensor | None, omega: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """In its backward: the gradients of input, bias and probe, all but that of ``compact``.

    The function's first arguments are ``x, weight, bias, compact``; :func:`keep_dtypes` was called in forward.
    """
    grad_x = grad_bias = grad_probe = None
    if ctx.needs_input_grad[0]:
        if ctx.quantizer is not None:
            grad_x = ctx.quantizer.input_gradient(grad_y, weight, keeps=ctx.keeps).to(ctx.x_dtype)
        else:
            whole = weight.t() if ctx.transposed else weight
            grad_x = grad_y.matmul(whole.to(grad_y.dtype)).to(ctx.x_dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad_y_2d.sum(0).to(ctx.bias_dtype)
    if probe_input is not None:
        observed = grad_y_2d
        if ctx.probe_kind == "columns":
            assert omega is not None
            observed = observed @ omega.to(observed.dtype)
        grad_probe = weight_gradient(observed, probe_input, ctx.transposed).to(ctx.probe_dtype)
    return grad_x, grad_bias, grad_probe


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, quantizer: Quantizer | None, transposed: bool, keeps: bool
) -> Tensor:
    """``x W^T + b`` in the dtype of ``x``; layers that are ``transposed`` have no quantizer."""
    added = None if bias is None else bias.to(x.dtype)
    if quantizer is None:
        return F.linear(x, (weight.t() if transposed else weight).to(x.dtype), added)
    y = quantizer.product(x, weight, keeps=keeps)
    return y if added is None else y + added


def weight_gradient(grad_y: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """``dY^T X``, or ``X^T dY`` for a weight of inputs times outputs; or of parts of them."""
    return x.t().mm(grad_y) if transposed else grad_y.t().mm(x)
