"""The ``quantization`` block: computing with fewer bits than are trained."""

from typing import Annotated, Literal

from pydantic import Field

from .blocks import StrictBlock


class QuantizationBlock(StrictBlock):
    """Linear layers that compute with rounded weights and inputs, in training, evaluation and generation."""

    method: Literal["bitnet"]
    """``bitnet``: weights of -1, 0 and 1 times a scale, inputs in 8 bits (BitNet b1.58, Ma et al. 2024, arXiv
    2402.17764); gradients go straight through the rounding to the weights behind it."""
    scale: Literal["mean", "median"] = "mean"
    """Of a weight's magnitudes, over the whole weight; ``median`` is that of "BitNet b1.58 Reloaded" (Nielsen and
    Schneider-Kamp 2024, arXiv 2407.09527)."""
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    """Globs over names of layers; default every ``nn.Linear`` within the blocks."""
