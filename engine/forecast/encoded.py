"""Saved tensors as a codec holds them: the codec's own operations, on tensors without contents."""

import weakref
from typing import Any

from torch import Tensor, nn

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

    def decode(self) -> Tensor:
        """The whole tensor."""
        return self._decoder.tensor_of(self.tensor)


class EncodedView:
    """What autograd holds in the place of a tensor."""

    def __init__(self, codes: Codes, tensor: Tensor) -> None:
        self.codes, self._place = codes, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self) -> Tensor:
        return self.codes.decode().as_strided(*self._place)


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
