"""The ``quantization`` block: computing with fewer bits than are trained."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .blocks import Flag, StrictBlock


class QuantizationBlock(StrictBlock):
    """Linear layers that compute with rounded weights and inputs, in training, evaluation and generation."""

    method: Literal["bitnet", "fp8"]
    """``bitnet``: weights of -1, 0 and 1 times a scale, inputs in 8 bits (BitNet b1.58, Ma et al. 2024, arXiv
    2402.17764); gradients go straight through the rounding to the weights behind it.
    ``fp8``: products in 8-bit floating point, by torchao."""
    scale: Literal["mean", "median"] = "mean"
    """Of ``bitnet``: of a weight's magnitudes, over the whole weight; ``median`` is that of "BitNet b1.58 Reloaded"
    (Nielsen and Schneider-Kamp 2024, arXiv 2407.09527)."""
    recipe: Literal["tensorwise", "rowwise"] = "tensorwise"
    """Of ``fp8``: torchao's; one scale for a tensor, or one for each row."""
    emulate: Flag = False
    """Of ``fp8``: round as FP8 does and compute in the model's precision, on any device."""
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    """Globs over names of layers; default every ``nn.Linear`` within the blocks."""

    @model_validator(mode="after")
    def _own_options(self) -> "QuantizationBlock":
        others = ("recipe", "emulate") if self.method == "bitnet" else ("scale",)
        if odd := [key for key in others if key in self.model_fields_set]:
            owner = "fp8" if self.method == "bitnet" else "bitnet"
            raise ValueError(f"{odd[0]} is of the method {owner!r}, got {self.method!r}")
        return self
