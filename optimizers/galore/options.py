"""GaLore's options."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from ..compact.options import CompactOptions
from ..options import COUNT, SHARE, SWITCH, RefreshInterval, WeightDecay, number, one_given, whole

Side = Literal["std", "left", "right", "full"]
Projector = Literal["sketch", "svd", "power"]
Moments = Literal["keep", "reset"]


@dataclass(frozen=True, kw_only=True)
class GaLoreOptions(CompactOptions):
    """Options of :class:`~.galore.GaLore`. Exactly one of ``rank`` and ``density`` is given."""

    rank: Annotated[
        int | None,
        COUNT,
        "of the subspace; at most the smaller dimension of every layer. A layer where it is just that stays an ordinary"
        " layer and is trained at the matrices' rate",
    ] = None
    density: Annotated[float | None, SHARE, "rank as a share of a layer's smaller dimension, in (0, 1]"] = None
    refresh_interval: RefreshInterval = 200
    scale: Annotated[float, number(above=0.0), "alpha of the paper, factor of the change; decay is not scaled"] = 0.25
    side: Annotated[
        Side,
        "``left`` projects the rows (``A``, ``m x r``), ``right`` the columns (``B``, ``n x r``; also shrinks what is"
        " kept for backward), ``full`` both, ``std`` the smaller dimension as the paper",
    ] = "std"
    projector: Annotated[
        Projector,
        "``sketch`` reduces ``rank + oversampling`` vectors per layer at a refresh; ``svd`` and ``power`` form and"
        " reduce the whole gradient of every layer at that step",
    ] = "sketch"
    oversampling: Annotated[
        int,
        whole(at_least=0),
        "further directions of the sketch. With 16 its basis captured 98 to 100 % of the energy that SVD's captures, in"
        " every layer of a small LLaMA trained for 40 steps, at densities from 1/16 to 1/4",
    ] = 16
    moments: Annotated[Moments, "at a refresh, ``keep`` as the paper, or ``reset`` with the step count"] = "keep"
    weight_decay: WeightDecay = 0.0
    reference_compatible: Annotated[
        bool,
        SWITCH,
        "as ``galore-torch``, in plain PyTorch and DDP only (see ``GaLoreReference``). Needs ``projector`` ``svd``,"
        " ``base`` ``AdamW`` and ``moments`` ``keep``",
    ] = False

    def _conflicts(self) -> Iterator[str]:
        yield from one_given(self, ("rank", "density"))
        yield from super()._conflicts()
        if self.side == "full" and self.projector == "sketch":
            yield "projector: expected 'svd' or 'power' with side 'full', got 'sketch'"
        if self.reference_compatible:
            for key, needed in (("projector", "svd"), ("base", "AdamW"), ("moments", "keep")):
                if getattr(self, key) != needed:
                    yield f"{key}: expected {needed!r} with reference_compatible, got {getattr(self, key)!r}"
