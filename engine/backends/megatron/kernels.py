"""Of which package the parts of a layer are. Light to import."""

from dataclasses import dataclass

import torch

from ...config.config import Config
from .installed import has_transformer_engine
from .keys import megatron_block


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What is Transformer Engine's; the rest is PyTorch's and Megatron's own. Linear layers always are: Transformer
    Engine's fuse a norm with the product after it, or keep gradients to themselves, and cannot be made compact.

    Attributes:
        norm: the norms.
        attention: causal attention.
        grouped: the products of all experts of a layer, which are one.
    """

    norm: bool = False
    attention: bool = False
    grouped: bool = False

    def describe(self) -> str | None:
        """What is Transformer Engine's, if anything."""
        parts = {"norms": self.norm, "attention": self.attention, "grouped experts": self.grouped}
        named = ", ".join(name for name, is_used in parts.items() if is_used)
        return f"{named} of Transformer Engine" if named else None


PLAIN = Kernels()


def choose(*, can_use_te: bool, bf16: bool, packed: bool, grouped: bool) -> Kernels:
    """
    Args:
        can_use_te: Transformer Engine is there, and a GPU for it.
        bf16: its fast attention takes no fp32.
        packed: examples attend to themselves alone; its causal attention would not see that.
        grouped: experts are asked for in grouped products.
    """
    return Kernels(norm=can_use_te, attention=can_use_te and bf16 and not packed, grouped=can_use_te and grouped)


def kernels_of(config: Config) -> Kernels:
    """For a run on this machine."""
    data = config.parsed.data
    return choose(
        can_use_te=megatron_block(config).transformer_engine and can_use_transformer_engine(),
        bf16=config.bf16,
        packed=data is not None and data.packing,
        grouped=megatron_block(config).grouped_experts,
    )


def can_use_transformer_engine() -> bool:
    return has_transformer_engine() and torch.cuda.is_available()
