"""What a codec of saved tensors does."""

from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage


class Decoder(Protocol):
    """The way back from one tensor's codes.

    Attributes:
        nbytes: of what it holds itself, beside the codes.
    """

    @property
    def nbytes(self) -> int: ...

    def decode(self, codes: UntypedStorage) -> UntypedStorage:
        """The bytes of the tensor, laid out as it was saved, in new memory on the codes' device."""
        ...

    def tensor_of(self, codes: Tensor) -> Tensor:
        """The tensor itself, from :meth:`Codec.encode`'s codes: what :meth:`decode` returns the bytes of."""
        ...


class Codec(Protocol):
    """Holds saved tensors in fewer bytes: encoded when forward saves them, decoded when backward asks for them.

    The codes are kept, written and read as the tensor itself would be. One codec serves all forwards of an
    :class:`~narrowgauge.offload.ActivationOffload`; what it learns from them is its state.
    """

    def encode(self, tensor: Tensor, place: str, generator: torch.Generator) -> tuple[Tensor, Decoder]:
        """The codes and the way back from them.

        Args:
            tensor: floating point, without holes or overlaps in its memory, at least one dimension.
            place: where it was saved, the same one in each forward.
            generator: of this forward, on the tensor's device; any random numbers come from it.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was learned so far; tensors by name."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
