"""The ``sampled_backward`` block: weight gradients from less than the whole input."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .blocks import StrictBlock


class SampledBackwardBlock(StrictBlock):
    """Linear layers that keep a part of their input for backward and estimate their weight's gradient from it."""

    method: Literal["wta_crs", "rad"]
    """``wta_crs``: some of the tokens (Liu et al. 2023, arXiv 2305.15265). ``rad``: all tokens, projected at random to
    fewer features (Oktay et al. 2021, arXiv 2007.10412). Both are right in the mean."""
    keep: Annotated[float, Field(gt=0, le=1)]
    """The share of the tokens of a micro-batch, or of the features, that is kept."""
    min_rows: Annotated[int, Field(ge=2)] = 10
    """Of ``wta_crs``: keep at least so many tokens."""
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    """Globs over names of layers; default every ``nn.Linear`` within the blocks, or with ``lora`` the factors that
    read the layers' inputs."""

    @model_validator(mode="after")
    def _own_options(self) -> "SampledBackwardBlock":
        if self.method == "rad" and "min_rows" in self.model_fields_set:
            raise ValueError("min_rows is of the method 'wta_crs', got 'rad'")
        return self
