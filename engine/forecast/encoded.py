"""Saved tensors as a codec holds them: the codec's own operations, on tensors without contents."""

import weakref
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from narrowgauge.offload.codecs import Decoder, make_codec
from narrowgauge.offload.options import OffloadOptions
from narrowgauge.offload.saving.encoding import Encoding
from narrowgauge.offload.saving.places import Places
from narrowgauge.offload.transfer.counters import Counters


class Codes:
    """What is kept of a storage.

    Attributes:
        tensor: the codes.
        nbytes: of them, and of what the way back takes beside them.
    """

    def __init__(self, tensor: Tensor, decoder: Decoder) -> None:
        self.tensor, self._decoder = tensor, decoder
        self.nbytes = tensor.nbytes + decoder.nbytes
        self._decoded: weakref.ref[Any] | None = None

    def decode(self) -> UntypedStorage:
        """The storage, once for as long as somebody holds it."""
        found = self._decoded() if self._decoded is not None else None
        if found is None:
            found = self._decoder.decode(self.tensor.untyped_storage())
            self._decoded = weakref.ref(found)
        return found


class EncodedView:
    """What autograd holds in the place of a tensor."""

    def __init__(self, codes: Codes, tensor: Tensor) -> None:
        self.codes, self._dtype, self._device = codes, tensor.dtype, tensor.device
        self._place = tensor.storage_offset(), tensor.shape, tensor.stride()

    def unpack(self) -> Tensor:
        found = torch.empty(0, dtype=self._dtype, device=self._device)
        found.set_(self.codes.decode(), *self._place)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return found


class Encoder:
    """Encodes what one forward saves, as :class:`~narrowgauge.offload.ActivationOffload` does.

    Args:
        model: the one that is run.
        options: of the offload, with a codec.
    """

    def __init__(self, model: nn.Module, options: OffloadOptions) -> None:
        codec = make_codec(options.codec)
        assert codec is not None
        self._places = Places(model, options.codec_modules)
        self._forward = Encoding(codec, self._places).begin_forward(
            Counters(), min_bytes=options.min_tensor_bytes, only_marked=options.granularity == "layer_inputs"
        )
        self._known: weakref.WeakKeyDictionary[Any, weakref.ref[Codes]] = weakref.WeakKeyDictionary()

    def pack(self, tensor: Tensor) -> tuple[EncodedView, bool] | None:
        """What stands for a tensor, and whether its storage is a new one; None where it is kept as it is."""
        storage: Any = tensor.untyped_storage()
        base = tensor._base if tensor._base is not None else tensor
        if not self._forward.serves(base, storage):
            return None
        reference = self._known.get(storage)
        codes = reference() if reference is not None else None
        if codes is not None:
            return EncodedView(codes, tensor), False
        codes = Codes(*self._forward.encode(base))
        self._known[storage] = weakref.ref(codes)
        return EncodedView(codes, tensor), True

    def close(self) -> None:
        """Take the hooks off the model."""
        self._places.remove()
