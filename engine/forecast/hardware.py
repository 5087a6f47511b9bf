"""Graphics processors, links and drives by their makers' figures. Light to import."""

import math
import re
from dataclasses import dataclass

from ..errors import UserError, did_you_mean

GIB = 1 << 30
# What CUDA, NCCL and fragmentation take of a GPU's memory.
RESERVED = 3 * GIB
# Shares of the makers' figures that large matrix products, plain operations and collectives reach.
PRODUCTS, OPERATIONS, LINKS = 0.6, 0.8, 0.8


@dataclass(frozen=True)
class Gpu:
    """Figures of a GPU.

    Attributes:
        memory: bytes.
        flops: of dense bf16 matrix products, per second.
        bandwidth: of its memory, bytes per second.
        link: bytes per second that it sends to others in its server.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float

    @property
    def usable(self) -> float:
        """Bytes for a run."""
        return self.memory - RESERVED


_PCIE = 25e9
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200-180", 180 * GIB, 2250e12, 8.0e12, 900e9),
        Gpu("h200-141", 141e9, 989e12, 4.8e12, 450e9),
        Gpu("h100-80", 80 * GIB, 989e12, 3.35e12, 450e9),
        Gpu("a100-80", 80 * GIB, 312e12, 2.04e12, 300e9),
        Gpu("a100-40", 40 * GIB, 312e12, 1.55e12, 300e9),
        Gpu("mi300x-192", 192 * GIB, 1307e12, 5.3e12, 448e9),
        Gpu("l40s-48", 48 * GIB, 362e12, 0.86e12, _PCIE),
        Gpu("rtx4090-24", 24 * GIB, 165e12, 1.01e12, _PCIE),
        Gpu("rtx3090-24", 24 * GIB, 71e12, 0.94e12, _PCIE),
        Gpu("a10-24", 24 * GIB, 125e12, 0.6e12, _PCIE),
        Gpu("l4-24", 24 * GIB, 121e12, 0.3e12, _PCIE),
    )
}


def gpu_named(name: str) -> Gpu:
    """
    Raises:
        UserError: there is none of this name.
    """
    if name not in GPUS:
        raise UserError(f"--gpu: expected one of {', '.join(GPUS)}, got {name!r}{did_you_mean(name.lower(), GPUS)}")
    return GPUS[name]


_UNITS = {"bit": 1 / 8, "bit/s": 1 / 8, "bps": 1 / 8, "b/s": 1.0, "b": 1.0}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def bytes_per_second(text: str, option: str) -> float:
    """A speed such as ``400gbit``, ``50GB/s``.

    Raises:
        UserError: it is none, or not above zero.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(bit/s|bit|bps|b/s|b)\s*", text.lower())
    try:
        value = float(found[1]) * _PREFIXES[found[2]] * _UNITS[found[3]] if found else 0.0
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise UserError(f"{option}: expected a speed such as 400gbit or 6GB/s, got {text!r}")
    return value
