"""What is trained through a small parameter in its stead: the weight of a layer, or the matrices of stacked experts.

What the ways to be compact have in common, and the probes through which statistics of the full gradient are had
without forming it.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .shape import whole_shape
from .watch import Watch

Side = Literal["columns", "rows"]
ProbeKind = Literal["rows", "columns", "full"]


class CompactUnit:
    """A frozen ``weight``, trained through ``compact``.

    The weight is seen as one matrix of shape ``(m, n)``: where it is a stack of ``num_matrices`` of them, as experts
    are kept, they lie below each other, and share the choice of a subspace's columns or rows.

    A *probe* is a leaf tensor that takes no part in the forward, whose gradient is a linear function of the full
    gradient ``G`` of the weight: ``G Omega`` (``rows``, ``(m, s)``), ``Omega^T G`` (``columns``, ``(s, n)``) or ``G``
    itself (``full``). Autograd adds it up over micro-batches as it does any gradient.

    Attributes:
        weight: frozen, as its module has it. Holds the current values of all entries once folded.
        compact: trainable, a matrix.
        weight_key, compact_key: what the two are called in the module that has them.
        is_named_by_weight: there are several in one module; a unit's name is that of its weight.
        weight_dim: number of dimensions of the weight.
        num_matrices: stacked in the weight.
        transposed: it is inputs times outputs.
        side: whether the subspace is one of the weight's columns or of its rows; of the rows where it is one of both.
        folds_at_use: ``compact`` is written over ``weight`` at each use, in forward and again in backward. An engine
            sets it whose ``weight`` is a temporary, put together from the parts of all process ranks for each use;
            only where ``compact`` holds values.
        weight_stays: the weight is where it is until it changes; an engine says so where it puts it together for each
            use.
        is_delta: ``compact`` holds a change that is to be added to ``weight``, not values of it.
        watch: notices what others than its optimizer do to it; None without an optimizer.
        was_called: a ``forward`` that uses it has run.
    """

    is_delta: ClassVar[bool]
    weight_key: str = "weight"
    compact_key: str = "compact"
    is_named_by_weight: ClassVar[bool] = False
    weight_dim: ClassVar[int] = 2
    num_matrices: int = 1
    transposed: bool = False
    weight: Tensor
    compact: nn.Parameter
    side: Side
    folds_at_use: bool
    weight_stays: bool = True
    probe: Tensor | None
    probe_kind: ProbeKind
    omega: Tensor | None
    watch: Watch | None = None
    was_called: bool = False

    def _become_compact(self, shape: tuple[int, int], side: Side) -> None:
        """The part of a conversion that is common; ``compact`` is left uninitialised."""
        raise NotImplementedError

    def revert(self) -> None:
        """Undo the conversion: the plain, trainable weight again."""
        raise NotImplementedError

    @property
    def stored_weights(self) -> Sequence[Tensor]:
        """The parameters of the model that hold the weight."""
        return (self.weight,)

    def holds_weight(self) -> bool:
        """Whether the weight is among its module's parameters: not where it is computed for each forward."""
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(m, n)``, also where an engine keeps only a part of the weight here."""
        m, n = whole_shape(self.weight)
        return m, n

    @property
    def compact_shape(self) -> tuple[int, int]:
        """Of ``compact``, also where an engine keeps only a part of it here."""
        rows, columns = whole_shape(self.compact)
        return rows, columns

    @property
    def num_choices(self) -> int:
        """How many columns or rows a selection is taken from."""
        return self.weight_shape[1] if self.side == "columns" else self.weight_shape[0] // self.num_matrices

    def is_whole(self) -> bool:
        """Whether both tensors are here as they are in the model: no engine has cut or flattened them."""
        dims = ((self.compact, 2), (self.weight, self.weight_dim))
        return all(p.dim() == dim and p.shape == whole_shape(p) for p, dim in dims)

    def agrees(self) -> bool:
        """Whether ``compact`` holds what stands for ``weight``, so that there is nothing to fold."""
        compact, expected = self.compact.detach(), self.compact_of(self.weight)
        return bool(((compact == expected) | ((compact != compact) & (expected != expected))).all())

    def agree_in(self, rows: slice) -> Tensor:
        """As :meth:`agrees`, of these rows of ``compact``, and with NaN unlike itself; a bool tensor."""
        return (self.compact.detach() == self.compact_of(self.weight))[rows].all()

    def note(self) -> None:
        """Weight and compact values are meant to be as they are now."""
        if self.watch is not None:
            self.watch.note(self)

    def look(self) -> None:
        """Raise if ``compact`` was changed by another than its optimizer (see :class:`.Watch`)."""
        if self.watch is not None:
            self.watch.look(self)

    def follow_weight(self) -> None:
        """The module was moved, or its dtype changed."""
        for key, value in self.subspace().items():
            setattr(self, key, value.to(self.weight.device))
        if self.probe is not None:
            self.start_probe(self.probe_kind, self.omega)

    def take_loaded_weight(self) -> None:
        """Another weight was loaded, one that is whole."""
        with torch.no_grad():
            self.compact.copy_(self.compact_of(self.weight))
        self.note()

    def begin_forward(self) -> None:
        """First of all in ``forward``."""
        if torch.compiler.is_compiling():
            # Nothing is written: within a checkpointed part that would break the graph.
            return
        if not self.was_called:
            self.was_called = True
        if self.watch is not None:
            self.watch.look(self)

    def compute_dtype(self, input: Tensor) -> torch.dtype:
        """The dtype of the matrix products: the input's, or autocast's.

        Raises:
            RuntimeError: the input's differs from the weight's without autocast.
        """
        if (dtype := autocast_dtype(input)) is not None:
            return dtype
        if input.dtype is not self.weight.dtype:
            raise RuntimeError(f"expected input and weight of one dtype, got {input.dtype} and {self.weight.dtype}")
        return input.dtype

    @property
    def dim(self) -> int:
        """The dimension of a matrix that the subspace is one of: 1 for columns, 0 for rows."""
        return 1 if self.side == "columns" else 0

    @property
    def rank(self) -> int:
        """The dimension of the subspace."""
        raise NotImplementedError

    def selected(self) -> Tensor:
        """The selected columns or rows, int64 ``(r,)``; only of layers whose subspace is a selection."""
        raise NotImplementedError

    def compact_of(self, weight: Tensor) -> Tensor:
        """The compact values that stand for ``weight``, given as a matrix or as it is stored."""
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

    def probe_shape(self, kind: ProbeKind, omega: Tensor | None) -> tuple[int, int]:
        """Of what a probe finds."""
        m, n = self.weight_shape
        if omega is None:
            assert kind == "full"
            return m, n
        return (m, omega.shape[1]) if kind == "rows" else (m // omega.shape[0] * omega.shape[1], n)

    def start_probe(self, kind: ProbeKind, omega: Tensor | None = None) -> None:
        """Observe the full gradient of the coming backward passes.

        Args:
            omega: ``(n, s)`` for ``rows``, ``(m, s)`` for ``columns``, or of stacked matrices ``(m / num_matrices, s)``
                for a sketch of each.
        """
        shape = self.probe_shape(kind, omega)
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


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast computes matrix products of ``input`` in; None where it leaves them alone."""
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type) and input.dtype is not torch.float64:
        return torch.get_autocast_dtype(device_type)
    return None
