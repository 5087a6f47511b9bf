"""Layers whose weight is trained through a small parameter and that never form the full weight gradient.

What the ways to be compact have in common: how the layer looks from outside, and the probes through which
statistics of the full gradient are had without forming it.
"""

from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .shape import whole_shape
from .watch import Watch, unwatch

Side = Literal["columns", "rows"]
ProbeKind = Literal["rows", "columns", "full"]


class CompactWeight(nn.Module):
    """A layer with a frozen ``weight`` of shape ``(m, n)``, trained through ``compact``.

    Made from an existing layer in place, so that names, hooks and references to it survive. To the outside it stays
    that layer: ``state_dict`` holds what it did, the weight folded, and loading plain weights rebuilds ``compact``.

    A *probe* is a leaf tensor that takes no part in the forward, whose gradient is a linear function of the full
    gradient ``G`` of the weight: ``G Omega`` (``rows``, ``(m, s)``), ``Omega^T G`` (``columns``, ``(s, n)``) or ``G``
    itself (``full``). Autograd adds it up over micro-batches as it does any gradient.

    Attributes:
        weight: ``(m, n)``, frozen. Holds the current values of all entries once folded.
        compact: trainable.
        side: whether the subspace is one of the weight's columns or of its rows; of the rows where it is one of both.
        folds_at_use: ``compact`` is written over ``weight`` at each use, in forward and again in backward. An engine
            sets it whose ``weight`` is a temporary, put together from the parts of all process ranks for each use;
            only where ``compact`` holds values.
        is_delta: ``compact`` holds a change that is to be added to ``weight``, not values of it.
        plain: the class of the layer it was made from.
        watch: notices what others than its optimizer do to it; None without an optimizer.
        was_called: its ``forward`` has run.
    """

    is_delta: ClassVar[bool]
    plain: ClassVar[type[nn.Module]]
    weight: Tensor
    compact: nn.Parameter
    side: Side
    folds_at_use: bool
    probe: Tensor | None
    probe_kind: ProbeKind
    omega: Tensor | None
    watch: Watch | None = None
    was_called: bool = False

    def _become_compact(self, shape: tuple[int, int], side: Side) -> None:
        """The part of a conversion that is common; ``compact`` is left uninitialised."""
        self.side, self.folds_at_use, self.probe, self.omega = side, False, None, None
        self.weight.requires_grad_(False)
        self.compact = nn.Parameter(torch.empty(shape, dtype=self.weight.dtype, device=self.weight.device))

    def revert(self) -> None:
        """Undo the conversion: the plain, trainable layer again."""
        del self.compact, self.side, self.folds_at_use, self.probe, self.omega
        for key in self.subspace():
            delattr(self, key)
        unwatch(self)
        for key in ("watch", "was_called"):
            self.__dict__.pop(key, None)
        self.weight.requires_grad_(True)
        self.__class__ = self.plain  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(m, n)``, also where an engine keeps only a part of the weight here."""
        m, n = whole_shape(self.weight)
        return m, n

    def agrees(self) -> bool:
        """Whether ``compact`` holds what stands for ``weight``, so that there is nothing to fold."""
        compact, expected = self.compact.detach(), self.compact_of(self.weight)
        return bool(((compact == expected) | ((compact != compact) & (expected != expected))).all())

    def note(self) -> None:
        """Weight and compact values are meant to be as they are now."""
        if self.watch is not None:
            self.watch.note(self)

    def look(self) -> None:
        """Raise if ``compact`` was changed by another than its optimizer (see :class:`.Watch`)."""
        if self.watch is not None:
            self.watch.look(self)

    def _begin_forward(self) -> None:
        """First of all in ``forward``."""
        if torch.compiler.is_compiling():
            # Nothing is written: within a checkpointed part that would break the graph.
            return
        if not self.was_called:
            self.was_called = True
        if self.watch is not None:
            self.watch.look(self)

    @property
    def dim(self) -> int:
        """The dimension of ``weight`` that the subspace is one of: 1 for columns, 0 for rows."""
        return 1 if self.side == "columns" else 0

    @property
    def rank(self) -> int:
        """The dimension of the subspace."""
        raise NotImplementedError

    def selected(self) -> Tensor:
        """The selected columns or rows, int64 ``(r,)``; only of layers whose subspace is a selection."""
        raise NotImplementedError

    def compact_of(self, weight: Tensor) -> Tensor:
        """The compact values that stand for ``weight``, ``(m, n)``."""
        raise NotImplementedError

    def apply_(
        self, weight: Tensor, compact: Tensor, decay: float = 1.0, *, seed: int = 0, decay_last: bool = False
    ) -> None:
        """Scale ``weight``, ``(m, n)``, by ``decay`` and bring it up to date with ``compact``, in place.

        Values are written over the selected entries; a change is added, in bf16 with stochastic rounding.

        Args:
            seed: of the rounding.
            decay_last: where ``compact`` holds a change: scale what has been changed.
        """
        raise NotImplementedError

    def apply_to_run_(
        self, run: Tensor, start: int, compact: Tensor, decay: float, *, seed: int, decay_last: bool = False
    ) -> None:
        """As :meth:`apply_`, for a 1-D run of the flattened weight.

        Args:
            start: position of its first element in the whole weight.
            compact: whole, flat, on the device of :meth:`subspace`; ``run`` may be on another.
        """
        raise NotImplementedError

    def compact_of_run(self, run: Tensor, start: int) -> Tensor:
        """:meth:`compact_of` a weight that is zero outside of a run of it, flat: those of all runs add up to the whole.

        Args:
            start: position of its first element in the whole weight.
        """
        raise NotImplementedError

    def project_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of ``compact`` that a gradient of the weight, ``(m, n)``, means."""
        raise NotImplementedError

    def subspace(self) -> dict[str, Tensor]:
        """The attributes that say which subspace this is."""
        raise NotImplementedError

    def set_subspace(self, tensors: dict[str, Tensor]) -> None:
        """Change :meth:`subspace`; weight and compact values are left as they are. In place, so a compiled forward is
        not compiled again.
        """
        for key, value in self.subspace().items():
            value.copy_(tensors[key])

    def start_probe(self, kind: ProbeKind, omega: Tensor | None = None) -> None:
        """Observe the full gradient of the coming backward passes.

        Args:
            omega: ``(n, s)`` for ``rows``, ``(m, s)`` for ``columns``.
        """
        m, n = self.weight_shape
        size = omega.shape[1] if omega is not None else 0
        shape = {"rows": (m, size), "columns": (size, n), "full": (m, n)}[kind]
        device, dtype = self.weight.device, torch.promote_types(self.weight.dtype, torch.float32)
        self.probe_kind = kind
        self.omega = omega.to(device=device, dtype=dtype) if omega is not None else None
        self.probe = torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()

    def end_probe(self) -> Tensor:
        """What was observed since :meth:`start_probe`, zeros if the layer was not used."""
        assert self.probe is not None
        found = self.probe.grad if self.probe.grad is not None else torch.zeros_like(self.probe)
        self.drop_probe()
        return found.detach().contiguous()

    def drop_probe(self) -> None:
        """Observe no longer."""
        self.probe = self.omega = None

    def forget_observed(self) -> None:
        """Observe from here on, as if :meth:`start_probe` had just been called."""
        if self.probe is not None:
            self.probe.grad = None

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        agreed = self.watch is None or self.watch.is_unchanged(self)
        super()._apply(fn, recurse)
        for key, value in self.subspace().items():
            setattr(self, key, value.to(self.weight.device))
        if self.probe is not None:
            self.start_probe(self.probe_kind, self.omega)
        if agreed:
            self.note()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.watch is not None:
            self.watch.compare(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "compact"]

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
        if prefix + "compact" in missing_keys:
            missing_keys.remove(prefix + "compact")
        self.weight.requires_grad_(False)
        if self.weight.shape == self.weight_shape and prefix + "weight" in state_dict:
            with torch.no_grad():
                self.compact.copy_(self.compact_of(self.weight))
            self.note()


class CompactLinear(CompactWeight, nn.Linear):
    """A compact ``nn.Linear``, for ``y = x W^T + b``: ``G = dY^T X``.

    Attributes:
        transposed: the layer is ``y = x W + b`` instead, with a weight of inputs times outputs: ``G = X^T dY``.
    """

    plain: ClassVar[type[nn.Module]] = nn.Linear
    transposed: ClassVar[bool] = False

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

    def _compute_dtype(self, input: Tensor) -> torch.dtype:
        """The dtype of the matrix products: the input's, or autocast's.

        Raises:
            RuntimeError: the input's differs from the weight's without autocast.
        """
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type) and input.dtype is not torch.float64:
            return torch.get_autocast_dtype(device_type)
        if input.dtype is not self.weight.dtype:
            raise RuntimeError(f"expected input and weight of one dtype, got {input.dtype} and {self.weight.dtype}")
        return input.dtype


@cache
def compact_class(compact: type[CompactWeight], plain: type[nn.Module]) -> Any:
    """``compact`` for layers of the type ``plain``, of which they stay instances."""
    if compact.plain is plain:
        return compact
    members = {"plain": plain, "__reduce__": _reduce_made}
    return type(f"{compact.__name__}Of{plain.__name__}", (compact, plain), members)


def _reduce_made(self: CompactWeight) -> Any:
    """For pickle and copy, which find a class by the module that it stands in."""
    compact = next(base for base in type(self).__bases__ if issubclass(base, CompactWeight))
    return _new_made, (compact, self.plain), self.__dict__.copy()


def _new_made(compact: type[CompactWeight], plain: type[nn.Module]) -> Any:
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
) -> None:
    """In the forward of a compact linear layer's autograd function: what its gradients have to be."""
    ctx.transposed = transposed
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


def weight_gradient(grad_y: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """``dY^T X``, or ``X^T dY`` for a weight of inputs times outputs; or of parts of them."""
    return x.t().mm(grad_y) if transposed else grad_y.t().mm(x)
