"""The ``lora`` block: training adapters beside a frozen model."""

from typing import Annotated, Literal

from pydantic import Field

from .blocks import Count, Flag, Number, StrictBlock


class LoraBlock(StrictBlock):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), by ``peft``: the model of ``model.path`` is frozen, and
    each targeted layer adds ``scale * B A x`` to its output; only A and B are trained.
    """

    rank: Count = 8
    """Rows of A and columns of B."""
    alpha: Annotated[Number, Field(gt=0.0)] = 16.0
    """The scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora``."""
    dropout: Annotated[Number, Field(ge=0.0, lt=1.0)] = 0.0
    """Of the adapters' inputs."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of layers, or ends of names such as ``q_proj``; ``all-linear`` is every linear layer but the head."""
    modules_to_save: list[str] = []
    """Ends of names of modules that are trained whole, and saved with the adapter: ``embed_tokens``, ``lm_head``."""
    rslora: Flag = False
    """Rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732)."""
    base: Literal["full", "nf4"] = "full"
    """``nf4``: the frozen linear layers are held in 4 bits by ``bitsandbytes`` (QLoRA, Dettmers et al. 2023,
    arXiv:2305.14314)."""
