"""Mesa: activations in 8 bits (Pan et al. 2021, "Mesa: A Memory-saving Training Framework for Transformers",
arXiv:2111.11124).

Forward computes with the exact tensors; what it saves is rounded to 256 levels between a running minimum and maximum
of each group of channels, or of each attention head. Rounding is stochastic, so that the saved value is right in the
mean: for ``v = 255 (x - beta) / alpha``, ``floor(v + u)`` with ``u`` uniform in ``[0, 1)``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from narrowgauge.kernels import computes

from . import mesa_rounding
from .mesa_rounding import LEVELS

DECAY = 0.9
GROUP_SIZE = 64
# Of a group whose values are all equal the range is 0.
_LEAST_RANGE = 1e-35


class Mesa8:
    """See the module. All arithmetic is in fp32.

    The range ``alpha`` and the minimum ``beta`` of a place are averages over forwards, with a decay of 0.9; the first
    forward sets them. The forward that is encoded takes part in them first. What lies outside is clamped, on both
    sides: a batch with a much wider range than those before it loses its outliers. Groups are the heads (dimension 1)
    of tensors with four dimensions, otherwise 64 neighbours of the last dimension.
    """

    def __init__(self) -> None:
        # By place: alpha and beta, fp32 (2, groups).
        self._ranges: dict[str, Tensor] = {}

    def encode(self, tensor: Tensor, place: str, generator: torch.Generator) -> tuple[Tensor, "MesaDecoder"]:
        """See :class:`.base.Codec`. The codes are uint8, laid out as the tensor."""
        tensor = tensor.detach()
        ranges = self._follow(place, _ranges_of(tensor))
        scale = LEVELS / ranges[0].clamp(min=_LEAST_RANGE)
        # In the order of memory.
        noise = torch.rand(tensor.numel(), generator=generator, dtype=torch.float32, device=tensor.device)
        codes = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.uint8, device=tensor.device)
        _rounding_on(tensor).encode(codes, tensor, noise, scale, ranges[1], *_groups_of(tensor.shape))
        return codes, MesaDecoder(tensor.dtype, tensor.shape, tensor.stride(), ranges)

    def _follow(self, place: str, found: Tensor) -> Tensor:
        """Take a batch's ranges into the running ones; a copy of these as they are now.

        Where the batch is not finite the running ones stay, and the copy is NaN: so will be what is decoded.
        """
        is_finite = found.isfinite()
        before = self._ranges.get(place)
        if before is None or before.shape != found.shape:
            # Of a place that begins with what is not finite.
            self._ranges[place] = torch.where(is_finite, found, 0.0)
        else:
            self._ranges[place] = torch.where(is_finite, torch.lerp(found, before.to(found.device), DECAY), before)
        return torch.where(is_finite, self._ranges[place], torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """The running ranges by place."""
        return dict(self._ranges)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` gave."""
        self._ranges = {place: ranges.clone() for place, ranges in state.items()}


@dataclass(frozen=True)
class MesaDecoder:
    """One tensor's way back; see :class:`.base.Decoder`.

    Attributes:
        dtype, shape, stride: of the tensor.
        ranges: alpha and beta of its groups, fp32 (2, groups); its own copy.
    """

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    ranges: Tensor

    @property
    def nbytes(self) -> int:
        return self.ranges.nbytes

    def decode(self, codes: UntypedStorage) -> UntypedStorage:
        levels = torch.empty(0, dtype=torch.uint8, device=self.ranges.device)
        levels.set_(codes, 0, self.shape, self.stride)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return self.tensor_of(levels).untyped_storage()

    def tensor_of(self, codes: Tensor) -> Tensor:
        values = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.ranges.device)
        alpha, beta = self.ranges
        _rounding_on(values).decode(values, codes, alpha / LEVELS, beta, *_groups_of(self.shape))
        return values


def _ranges_of(tensor: Tensor) -> Tensor:
    """Largest less smallest, and smallest value of each group, fp32 (2, groups)."""
    if tensor.dim() == 4:
        low, high = tensor.amin((0, 2, 3)).float(), tensor.amax((0, 2, 3)).float()
    else:
        others = tuple(range(tensor.dim() - 1))
        low, high = (tensor.amin(others), tensor.amax(others)) if others else (tensor, tensor)
        low, high = (_in_groups(edge.float()) for edge in (low, high))
        low, high = low.amin(1), high.amax(1)
    return torch.stack([high - low, low])


def _in_groups(channels: Tensor) -> Tensor:
    """``(groups, 64)``; the last group is filled up with its last channel."""
    missing = -len(channels) % GROUP_SIZE
    return torch.cat([channels, channels[-1:].expand(missing)]).view(-1, GROUP_SIZE)


def _groups_of(shape: torch.Size) -> tuple[int, int]:
    """Along which dimension groups lie, and how many neighbours are one."""
    return (1, 1) if len(shape) == 4 else (len(shape) - 1, GROUP_SIZE)


def _rounding_on(tensor: Tensor) -> Any:
    """The module that has the arithmetic for a tensor where it is."""
    if not computes("Mesa's rounding", tensor, _kernels_agree, tensor.dtype):
        return mesa_rounding
    from . import mesa_triton

    return mesa_triton


def _kernels_agree(device: torch.device, dtype: torch.dtype) -> bool:
    from . import mesa_triton

    return mesa_rounding.rounds_alike(mesa_triton, device, dtype)
