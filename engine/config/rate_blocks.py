"""The blocks of ``training`` that say how large a step is."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .blocks import Count, Number, StrictBlock

_OF_POWER = ("coefficient", "exponent", "reference_length")


class ScheduleBlock(StrictBlock):
    """The learning rate over the run: transformers' schedules, and ``power``, which knows no end."""

    type: Literal["constant", "cosine", "wsd", "power"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, gt=0)
    """Of ``wsd`` and ``power``: steps of the final decay; default a fifth of the run for ``wsd``, none for
    ``power``."""
    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """The last learning rate relative to the highest."""
    coefficient: Annotated[Number, Field(gt=0.0)] = 4.0
    """Of ``power``: a in ``min(lr, batch * a * tokens ** b)``."""
    exponent: Annotated[Number, Field(lt=0.0)] = -0.51
    """Of ``power``: b."""
    reference_length: Count = 4096
    """Of ``power``: tokens of the sequences that the batch is counted in."""

    @model_validator(mode="after")
    def _own_options(self) -> "ScheduleBlock":
        given = self.model_fields_set
        if self.type != "power" and (odd := [key for key in _OF_POWER if key in given]):
            raise ValueError(f"{odd[0]} is of the type 'power', got {self.type!r}")
        if self.decay_steps is not None and self.type not in ("wsd", "power"):
            raise ValueError(f"decay_steps is of the types 'wsd' and 'power', got {self.type!r}")
        if self.type == "power" and "min_lr_ratio" in given and self.decay_steps is None:
            raise ValueError("min_lr_ratio is where decay_steps of 'power' lead, got no decay_steps")
        return self


class BatchRuleBlock(StrictBlock):
    """The rates of the configuration were found at another batch size: they are scaled to this run's."""

    base_batch_size: Count
    """Sequences per optimizer step at which ``optimizer.params.lr`` was found."""
    rule: Literal["auto", "linear", "sqrt"] = "auto"
    """``linear``: in proportion (Goyal et al. 2017, arXiv 1706.02677); ``sqrt``: with the square root (Malladi et al.
    2022, arXiv 2205.10287); ``auto``: linear for SGD and Lars, else the square root."""


class TrustRegionBlock(StrictBlock):
    """TRAlgorithm around the optimizer: see :class:`narrowgauge.optimizers.TrustRegion`."""

    pull: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.1
    """Weight of the proximal term, lambda; the pull of a step is ``2 * pull / (t + 1)`` of the way to the anchor."""
    steps: Count = 10
    """Optimizer steps of a cycle: the anchor moves at the first, and the rate of step t, from 0, is divided by
    ``t + 1``."""


class LengthPhaseBlock(StrictBlock):
    """Steps of shorter sequences, and of as many more."""

    lengths: Annotated[list[Annotated[int, Field(gt=1)]], Field(min_length=1)]
    """Tokens per sequence; the phase's steps take them in turn. Each divides ``data.sequence_length``."""
    steps: Count


class WidthRuleBlock(StrictBlock):
    """The rates were found at another width: those of matrices within the blocks go with its inverse, as muP has it for
    Adam (Yang et al. 2022, arXiv 2203.03466, Table 8). Initial weights and the model's multipliers are not changed.
    """

    base_width: Count
    """The ``hidden_size`` at which the rates were found."""
