"""The ``coreset`` block: training on a chosen part of a larger batch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .blocks import Count, Number, StrictBlock

_Moment = Annotated[Number, Field(ge=0.0, lt=1.0)]
_OF_COLM = ("directions", "epsilon", "coordinates", "betas", "module", "whole_sources")


class CoresetBlock(StrictBlock):
    """``train_batch_size`` is what is trained; the batch that it is chosen from is ``1 / keep`` times as large."""

    method: Literal["colm", "hard"]
    """``colm``: all examples of small sources, and of the others those whose gradients represent the rest; ``hard``:
    those with the highest loss."""
    keep: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of the large batch that is trained."""
    directions: Count = 4
    """Of ``colm``: random directions along which each example's gradient is estimated, drawn anew for each step."""
    epsilon: Annotated[Number, Field(gt=0.0)] = 1e-2
    """Of ``colm``: step along a direction, on both sides."""
    coordinates: Count = 2560
    """Of ``colm``: of a source's vectors those with the largest mean are compared."""
    betas: tuple[_Moment, _Moment] = (0.9, 0.999)
    """Of ``colm``: of the moments that normalise the gradients as Adam does."""
    module: str | None = None
    """Of ``colm``: the linear layer whose gradient is estimated; default the last ``v_proj``, of adapters its B."""
    whole_sources: list[str] | None = None
    """Of ``colm``: names of sources whose examples are all trained; default those with fewer samples than the mean."""
    skip_hardest: Annotated[Number, Field(ge=0.0, lt=1.0)] = 0.0
    """Of ``hard``: share of the large batch with the very highest loss that is left out, as it may be noise."""

    @model_validator(mode="after")
    def _own_options(self) -> "CoresetBlock":
        given = self.model_fields_set
        if self.method == "hard" and (odd := sorted(given & set(_OF_COLM))):
            raise ValueError(f"{odd[0]} is of the method 'colm', got 'hard'")
        if self.method == "colm" and "skip_hardest" in given:
            raise ValueError("skip_hardest is of the method 'hard', got 'colm'")
        if self.keep + self.skip_hardest > 1.0:
            raise ValueError(
                f"expected keep and skip_hardest to be at most 1 together, got {self.keep + self.skip_hardest}"
            )
        return self
