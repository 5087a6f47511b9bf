"""Options that the optimizers of compact parameters have in common."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal

from ..options import COUNT, SHARE, SWITCH, AdamOptions, Foreach, RefreshInterval, Seed, number
from .muon import AdjustRate

BaseName = Literal["AdamW", "AdamW8bit", "Adafactor", "Muon", "NorMuon"]
_BETA = number(at_least=0.0, below=1.0)
_OF_MUON = ("momentum", "nesterov", "adjust_lr_fn", "orthogonalized_in")


@dataclass(frozen=True, kw_only=True)
class CompactOptions(AdamOptions):
    """Rank, refresh, and the optimizer that updates the compact parameters."""

    rank: Annotated[int | None, COUNT, "of the subspace of each layer"] = None
    density: Annotated[float | None, SHARE, "the rank as a share of the dimension, in (0, 1]"] = None
    refresh_interval: RefreshInterval = 200
    seed: Seed = 0
    foreach: Foreach = None
    fused: Annotated[bool | None, SWITCH, "as in ``torch.optim.AdamW``"] = None
    base: Annotated[
        BaseName,
        "the optimizer of all parameters: ``AdamW``, ``AdamW8bit`` (bitsandbytes; moments in 8 bits, which a checkpoint"
        " of an engine holds in fp32), ``Adafactor`` (plain PyTorch and DDP only), or ``Muon`` and ``NorMuon``:"
        " orthogonalized momentum for the matrices, and ``AdamW`` for all others",
    ] = "AdamW"
    momentum: Annotated[float | None, _BETA, "of ``Muon`` and ``NorMuon``; default 0.95"] = None
    nesterov: Annotated[bool | None, SWITCH, "of ``Muon`` and ``NorMuon``; default True"] = None
    adjust_lr_fn: Annotated[
        AdjustRate | None,
        "of ``Muon`` and ``NorMuon``: what the matrices' rate is multiplied by, as in ``torch.optim.Muon`` and of the"
        " compact matrix's shape. ``match_rms_adamw``, the default, at which rates are AdamW's, or ``original``",
    ] = None
    orthogonalized_in: Annotated[
        Literal["float32", "bfloat16"] | None,
        "of ``Muon`` and ``NorMuon``: the precision of their iteration; ``bfloat16`` is that of ``torch.optim.Muon``."
        " Default float32, float64 for weights in it",
    ] = None
    neuron_beta: Annotated[
        float | None, _BETA, "of ``NorMuon``: decay rate of the outputs' second moments; default 0.95"
    ] = None

    min_compact_share: Annotated[
        float,
        number(at_least=0.0, at_most=1.0),
        "share of the matrices in the blocks below which it is an error that the others are trained whole, as AdamW"
        " does; only for the default ``target_modules``",
    ] = 0.5

    def _conflicts(self) -> Iterator[str]:
        yield from super()._conflicts()
        if self.foreach and self.fused:
            yield "fused: expected one of foreach and fused, got both"
        if self.base != "AdamW" and self.fused:
            yield f"fused: expected None with base {self.base}, which has no fused form, got True"
        if self.base == "AdamW8bit" and self.foreach:
            yield "foreach: expected None with base AdamW8bit, which has no foreach form, got True"
        if self.base == "AdamW8bit" and find_spec("bitsandbytes") is None:
            yield "base: 'AdamW8bit' needs bitsandbytes: pip install 'narrowgauge[8bit]'"
        yield from self._conflicts_of_muon()
        unused = sorted({"betas", "eps"} & {key for group in self.param_groups for key in group})
        if self.base == "Adafactor" and unused:
            yield f"param_groups: expected no {unused} with base Adafactor, which does not have them"

    def _conflicts_of_muon(self) -> Iterator[str]:
        is_muon = self.base in ("Muon", "NorMuon")
        unused = [*(() if is_muon else _OF_MUON), *(() if self.base == "NorMuon" else ("neuron_beta",))]
        for key in unused:
            if (found := getattr(self, key)) is not None:
                yield f"{key}: expected None with base {self.base}, which does not have it, got {found!r}"
