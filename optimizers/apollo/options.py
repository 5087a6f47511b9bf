"""Apollo's options."""

from dataclasses import dataclass
from typing import Annotated

from ..options import COUNT, SWITCH, AdamOptions, Foreach, RefreshInterval, Seed, number
from .channels import ScaleType


@dataclass(frozen=True, kw_only=True)
class ApolloOptions(AdamOptions):
    """Options of :class:`~.apollo.Apollo`."""

    rank: Annotated[
        int,
        COUNT,
        "of the projection; at most the shorter side of every matrix. The paper's is 1/4 of the shorter side, and 1 for"
        " APOLLO-Mini",
    ]
    refresh_interval: RefreshInterval = 200
    scale: Annotated[
        float | None,
        number(above=0.0),
        "the paper's alpha; default 1 for ``channel`` and, as for APOLLO-Mini, sqrt(128) for ``tensor``",
    ] = None
    scale_type: Annotated[ScaleType, "``channel``, or ``tensor`` as in APOLLO-Mini"] = "channel"
    norm_growth_limit: Annotated[
        float | None, number(above=1.0), "by what an update's norm may grow from step to step; None for no limiter"
    ] = 1.01
    seed: Seed = 0
    foreach: Foreach = None
    reference_compatible: Annotated[
        bool, SWITCH, "compute as ``apollo-torch`` 1.0.3 does (see ``ApolloReference``)"
    ] = False
