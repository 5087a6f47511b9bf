"""Which of the tensors that a forward saves are encoded, and their way into a codec."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..codecs import Codec, Decoder
from ..transfer.counters import Counters
from .places import Places

# What casts and views a parameter, as autocast does, without becoming an activation.
_OF_A_PARAMETER = {
    f"{name}Backward{number}"
    for name in ("ToCopy", "T", "Transpose", "View", "UnsafeView", "Alias", "Permute", "Slice", "Select", "Reshape")
    for number in (0, 1)
}


class Encoding:
    """A codec and the places of a model that it serves; the same for all forwards.

    Attributes:
        forwards: begun so far, those before a restart included.
        begun_here: begun since this was made.
    """

    def __init__(self, codec: Codec, places: Places) -> None:
        self.codec, self.places = codec, places
        self.forwards = self.begun_here = 0

    def begin_forward(self, counters: Counters, *, min_bytes: int, only_marked: bool) -> "ForwardEncoding":
        """What encodes the tensors of the coming forward."""
        self.forwards += 1
        self.begun_here += 1
        self.places.begin_forward()
        return ForwardEncoding(self, counters, min_bytes=min_bytes, only_marked=only_marked)

    def state_dict(self) -> dict[str, Any]:
        """What the codec has learned, and how many forwards there were."""
        return {"forwards": self.forwards, "places": self.codec.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.forwards = state["forwards"]
        self.codec.load_state_dict(state["places"])


class ForwardEncoding:
    """Encodes what one forward saves. Its random numbers are its own, so that the model's stay as they are without it:
    a function of how many forwards there were before, and of the process rank.
    """

    def __init__(self, owner: Encoding, counters: Counters, *, min_bytes: int, only_marked: bool) -> None:
        self._codec, self._places, self._number = owner.codec, owner.places, owner.forwards
        self._counters, self._min_bytes, self._only_marked = counters, min_bytes, only_marked
        self._generators: dict[torch.device, torch.Generator] = {}

    def serves(self, base: Tensor, storage: Any) -> bool:
        """Whether a tensor that is saved now is to be encoded.

        Activations are, which have a gradient or were marked as such; not what else forward uses (masks, angles,
        statistics), nor parameters in another form.
        """
        if self._only_marked:
            if not hasattr(storage, "_narrowgauge_layer_input"):
                return False
        elif not self._places.is_served():
            return False
        is_activation = hasattr(storage, "_narrowgauge_activation") or (
            base.requires_grad and not base.is_leaf and not _is_of_a_parameter(base)
        )
        return (
            is_activation
            and base.is_floating_point()
            and base.dim() > 0
            and base.shape[-1] > 1
            and storage.nbytes() >= self._min_bytes
            and base.numel() * base.element_size() == storage.nbytes()
            and _is_dense(base)
        )

    def encode(self, base: Tensor) -> tuple[Tensor, Decoder]:
        """The codes of a tensor, and the way back."""
        device = base.device
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
            generator.manual_seed(_seed(self._number))
        codes, decoder = self._codec.encode(base, self._places.next_place(), generator)
        self._counters.encoded_from += base.numel() * base.element_size()
        self._counters.encoded_to += codes.nbytes + decoder.nbytes
        return codes, decoder


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _seed(number: int) -> int:
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    digest = hashlib.sha256(f"codec/{rank}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _is_of_a_parameter(tensor: Tensor) -> bool:
    node: Any = tensor.grad_fn
    while node is not None and node.name() in _OF_A_PARAMETER and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)
