"""Codecs of saved tensors: fewer bytes for what forward keeps for backward."""

from collections.abc import Callable
from typing import Literal, get_args

from .base import Codec, Decoder
from .mesa import Mesa8

CodecName = Literal["none", "mesa8"]
_CODECS: dict[str, Callable[[], Codec]] = {"mesa8": Mesa8}


def make_codec(name: CodecName) -> Codec | None:
    """A new one by its name; None for ``none``."""
    return _CODECS[name]() if name != "none" else None


def codec_names() -> tuple[str, ...]:
    return get_args(CodecName)


__all__ = ["Codec", "CodecName", "Decoder", "Mesa8", "codec_names", "make_codec"]
