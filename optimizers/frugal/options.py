"""Frugal's options."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from ..options import AdamOptions, Foreach, RefreshInterval, Seed, number
from .subspaces import LOW_RANK, BlockOrder, Rule, SelectionName

StateFree = Literal["signSGD", "SGD"]
Reduction = Literal["mean", "majority_vote"]


@dataclass(frozen=True, kw_only=True)
class FrugalOptions(AdamOptions):
    """Options of :class:`~.frugal.Frugal`."""

    density: Annotated[
        float,
        number(at_least=0.0, at_most=1.0),
        "state-full share of each projected parameter, in [0, 1]; at 0 all of it is state-free",
    ] = 0.25
    selection: Annotated[
        SelectionName,
        "``columns``, ``rows``; ``randk`` (single coordinates; on a CPU several times AdamW's time); ``blockwise``"
        " (whole parameters, that share of their number; what it keeps follows their sizes); ``svd`` (leading singular"
        " vectors of the gradient at the refresh); ``random`` (a random semi-orthogonal projection)",
    ] = "columns"
    block_order: Annotated[BlockOrder, "in which order ``blockwise`` takes the parameters"] = "random"
    state_free: Annotated[StateFree, "rule of the remainder"] = "signSGD"
    state_free_lr_scale: Annotated[
        float,
        number(at_least=0.0),
        "its learning rate relative to the parameter's; 0 leaves it where it is",
    ] = 1.0
    decay: Annotated[
        Literal["all", "active"],
        "what decays: ``all`` coordinates, or the ``active``, state-full ones alone; not for ``svd`` and ``random``",
    ] = "all"
    refresh_interval: RefreshInterval = 200
    embeddings: Annotated[
        Rule,
        "rule of ``nn.Embedding`` weights: ``full`` (AdamW), ``projected`` as the matrices, or ``free`` (state-free as"
        " a whole). Tied weights count as embeddings",
    ] = "full"
    head: Annotated[
        Rule, "as ``embeddings``, of untargeted linears with as many outputs as an embedding has entries"
    ] = "full"
    norms: Annotated[
        Literal["full", "free"],
        "rule of all parameters of fewer than two dimensions. Whatever is none of these and no matrix is ``full``",
    ] = "full"
    reduction: Annotated[
        Reduction,
        "``mean``: gradients are averaged by whoever runs the backward. ``majority_vote``: every rank brings its own"
        " gradients, in plain PyTorch without DDP; those of state-full coordinates are averaged, and the others' update"
        " is the sign of the sum over ranks of their gradients' signs, 0 at a tie, sent as one bit each, two on steps"
        " in which a rank has an exact zero among them. All ranks need gradients for the same parameters. This is not"
        " the sign of the mean gradient",
    ] = "mean"
    seed: Seed = 0
    foreach: Foreach = None

    def _conflicts(self) -> Iterator[str]:
        yield from super()._conflicts()
        if self.block_order != "random" and self.selection != "blockwise":
            yield f"block_order: expected 'random' with selection {self.selection!r}, got {self.block_order!r}"
        if self.decay == "active" and self.selection in LOW_RANK:
            yield f"decay: expected 'all' with selection {self.selection!r}, which chooses no coordinates, got 'active'"
        if self.reduction == "majority_vote" and (self.state_free != "signSGD" or self.selection in LOW_RANK):
            yield (
                "reduction: 'majority_vote' expected state_free 'signSGD' and a selection of coordinates, got"
                f" {self.state_free!r} and {self.selection!r}"
            )
