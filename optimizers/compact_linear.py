"""A linear layer that trains a subset of its columns or rows and never forms the full weight gradient.

For ``y = x W^T + b`` with ``W`` of shape ``(m, n)``, ``W`` is frozen and ``compact`` is trained in its stead:

* ``columns``: ``compact`` is ``W[:, index]``, shape ``(m, r)``; its gradient is ``dY^T @ X[:, index]``, so only that
  copy of the input is kept for backward;
* ``rows``: ``compact`` is ``W[index, :]``, shape ``(r, n)``; its gradient is ``dY[:, index]^T @ X``.

``dX = dY @ W`` is exact in both. This is the projection of Grass (Muhamed et al., 2024, arXiv 2406.17660) with scale 1,
held as values instead of as a delta.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Side = Literal["columns", "rows"]


def read_selected(full: Tensor, index: Tensor, start: int | None, dim: int) -> Tensor:
    """A copy of the selected entries of a matrix along ``dim``; a view would keep all of ``full`` alive."""
    if start is not None:
        return full.narrow(dim, start, index.numel()).clone(memory_format=torch.contiguous_format)
    if dim == 0:
        return full.index_select(0, index)
    # Along the columns gather is faster than index_select, on the CPU by a factor of up to three.
    return full.gather(1, index.expand(full.shape[0], -1))


def write_selected_(full: Tensor, values: Tensor, index: Tensor, start: int | None, dim: int) -> None:
    """Write ``values`` over the selected entries of ``full`` along ``dim``, in place."""
    if start is None:
        full.index_copy_(dim, index, values)
    else:
        full.narrow(dim, start, index.numel()).copy_(values)


class _CompactLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compact: Tensor,
        index: Tensor,
        start: int | None,
        columns: bool,
        overlay: bool,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        if overlay:
            write_selected_(weight.data, compact.data, index, start, dim=1 if columns else 0)
        ctx.x_dtype = x.dtype
        x = x.to(compute_dtype)
        y = F.linear(x, weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype))
        saved_x = read_selected(x.reshape(-1, x.shape[-1]), index, start, dim=1) if columns else x
        # The weight is saved as it is, not its cast: autocast must not keep a second copy of the model alive.
        ctx.save_for_backward(saved_x, weight, index, compact if overlay else None)
        ctx.start, ctx.columns = start, columns
        ctx.compact_dtype = compact.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y,) = grad_outputs
        saved_x, weight, index, compact = ctx.saved_tensors
        if compact is not None:
            write_selected_(weight.data, compact.data, index, ctx.start, dim=1 if ctx.columns else 0)
        grad_x = grad_bias = grad_compact = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y.matmul(weight.to(grad_y.dtype)).to(ctx.x_dtype)
        grad_y_2d = grad_y.reshape(-1, grad_y.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y_2d.sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[3]:
            if ctx.columns:
                grad_compact = grad_y_2d.t().mm(saved_x)
            else:
                x_2d = saved_x.reshape(-1, saved_x.shape[-1])
                grad_compact = read_selected(grad_y_2d, index, ctx.start, dim=1).t().mm(x_2d)
            grad_compact = grad_compact.to(ctx.compact_dtype)
        return grad_x, None, grad_bias, grad_compact, None, None, None, None, None


class CompactLinear(nn.Linear):
    """An ``nn.Linear`` whose selected columns or rows are trained through a small ``compact`` parameter.

    Made from an existing layer by :meth:`convert`, in place, so that names, hooks and references to it survive. To the
    outside it stays that layer: ``state_dict`` holds ``weight`` (folded) and ``bias`` only, and loading plain weights
    rebuilds ``compact``.

    Attributes:
        weight: ``(m, n)``, frozen. Holds the current values of all entries once folded.
        compact: trainable, ``(m, r)`` for columns or ``(r, n)`` for rows.
        index: the selected columns or rows, int64 ``(r,)``, on the weight's device. Deliberately not a buffer: DDP
            would broadcast it at every forward.
        overlay: ``compact`` is written over ``weight`` at each use, for backends whose ``weight`` is a gathered
            temporary (ZeRO-3).
    """

    compact: nn.Parameter
    index: Tensor
    side: Side
    start: int | None
    overlay: bool

    @staticmethod
    def convert(linear: nn.Linear, *, side: Side, index: Tensor, contiguous: bool) -> "CompactLinear":
        """Turn ``linear`` into a ``CompactLinear`` in place; ``compact`` is registered but left uninitialised."""
        linear.__class__ = CompactLinear
        assert isinstance(linear, CompactLinear)
        linear.side, linear.overlay = side, False
        linear.index = index.to(linear.weight.device)
        linear.start = int(index[0]) if contiguous else None
        m, n = linear.weight_shape
        shape = (m, index.numel()) if side == "columns" else (index.numel(), n)
        linear.weight.requires_grad_(False)
        linear.compact = nn.Parameter(torch.empty(shape, dtype=linear.weight.dtype, device=linear.weight.device))
        return linear

    def revert(self) -> None:
        """Undo :meth:`convert`: a plain, trainable ``nn.Linear`` again."""
        del self.compact, self.index, self.side, self.start, self.overlay
        self.weight.requires_grad_(True)
        self.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(m, n)``, also where ZeRO-3 holds only a shard of the weight."""
        m, n = getattr(self.weight, "ds_shape", self.weight.shape)
        return m, n

    @property
    def dim(self) -> int:
        """The dimension of ``weight`` that is selected from."""
        return 1 if self.side == "columns" else 0

    def read(self, full: Tensor) -> Tensor:
        """The selected entries of a tensor shaped like ``weight``, as a copy shaped like ``compact``."""
        return read_selected(full, self.index, self.start, self.dim)

    def write_(self, full: Tensor, values: Tensor) -> None:
        """Write ``values``, shaped like ``compact``, over the selected entries of ``full``."""
        write_selected_(full, values, self.index, self.start, self.dim)

    def subspace(self) -> dict[str, Tensor]:
        """The tensors that say which subspace this is."""
        return {"index": self.index}

    def set_subspace(self, tensors: dict[str, Tensor]) -> None:
        """Restore :meth:`subspace`; weight and compact values are left as they are."""
        self.set_index(tensors["index"])

    def set_index(self, index: Tensor) -> None:
        """Select other columns or rows. In place, so a compiled forward is not compiled again."""
        self.index.copy_(index)
        if self.start is not None:
            self.start = int(index[0])

    def forward(self, input: Tensor) -> Tensor:
        compute_dtype = input.dtype
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type) and compute_dtype is not torch.float64:
            compute_dtype = torch.get_autocast_dtype(device_type)
        elif compute_dtype is not self.weight.dtype:
            raise RuntimeError(f"expected input and weight of one dtype, got {compute_dtype} and {self.weight.dtype}")
        return _CompactLinearFunction.apply(
            input,
            self.weight,
            self.bias,
            self.compact,
            self.index,
            # A Python int would be a constant of the compiled graph and recompile it at every refresh.
            None if torch.compiler.is_compiling() else self.start,
            self.side == "columns",
            self.overlay,
            compute_dtype,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, side={self.side}, rank={self.index.numel()}"

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.index = self.index.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
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
                self.compact.copy_(self.read(self.weight))
