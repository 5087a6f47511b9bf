"""Grass's options."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..compact.options import CompactOptions
from ..layers.unit import Side
from ..numerics.selection import SELECTION_RULES
from ..options import COUNT, SHARE, Check, RefreshInterval, one_given
from .norms import Statistics
from .sharing import SharedInputs

Selection = Literal["uniform", "block", "top", "multinomial", "multinomial_replacement"]
Decay = Literal["active", "all"]
Moments = Literal["reset", "carry"]
Vocabulary = Literal["dense", "rows"]


def _is_sharing(value: Any) -> bool:
    if value == "siblings":
        return True
    lists = isinstance(value, list) and all(isinstance(globs, list) and globs for globs in value)
    return lists and all(isinstance(glob, str) for globs in value for glob in globs)


@dataclass(frozen=True, kw_only=True)
class GrassOptions(CompactOptions):
    """Options of :class:`~.grass.Grass`. Exactly one of ``rank``, ``density`` and ``budget`` is given."""

    rank: Annotated[int | None, COUNT, "selected columns or rows per layer; at most what every layer has"] = None
    density: Annotated[
        float | None,
        SHARE,
        "selected share of the columns or rows, in (0, 1]. A layer whose rank is its whole dimension stays an ordinary"
        " layer and is trained at the compact parameters' rate; with density 1 this is ``torch.optim.AdamW``",
    ] = None
    budget: Annotated[
        int | None,
        COUNT,
        "elements of all compact parameters together; the density follows, and is equal in all layers up to one column"
        " or row",
    ] = None
    side: Annotated[Side, "``columns`` (inputs; also shrinks what is kept for backward) or ``rows`` (outputs)"] = (
        "columns"
    )
    selection: Annotated[
        Selection,
        "``uniform``; ``block`` (one contiguous block: slices instead of gathers); by the norms of the gradient's"
        " columns or rows: ``top`` (the largest), ``multinomial`` (drawn without replacement, with probabilities"
        " proportional to the norms), ``multinomial_replacement`` (drawn independently, so with repeats, and scaled:"
        " the projected gradient, lifted back, has the full one as its expectation)",
    ] = "uniform"
    statistics: Annotated[
        Statistics,
        "where the norms come from, once per refresh. ``sketch``: ``sketch_size`` random projections of the averaged"
        " gradient, ``m * sketch_size`` numbers reduced per layer (columns: ``n *``), with all of the input kept for"
        " backward at that step. ``exact``: the averaged gradient itself, formed and reduced at that step. ``local``:"
        " the first process rank's gradient, formed there and not reduced",
    ] = "sketch"
    sketch_size: Annotated[int, COUNT, "the relative error of a norm is about ``1 / sqrt(2 * sketch_size)``"] = 32
    strata: Annotated[
        int,
        COUNT,
        "the same number of columns or rows is selected in each of so many equal blocks of a layer's. Tensor"
        " parallelism that cuts the selected dimension over process ranks needs a multiple of their number",
    ] = 1
    shared_inputs: Annotated[
        SharedInputs,
        Check("'siblings' or a list of lists of globs", _is_sharing),
        "layers that share an input share the choice of columns, and keep one copy of them for backward, which saves"
        " memory and costs about 1 % of loss (``benchmarks/quality.py``). ``siblings`` finds them by their names (q, k"
        " and v; gate and up) where it applies; a list of lists of globs over module names says which siblings; None"
        " shares nothing. Not for rows or ``multinomial_replacement``",
    ] = None
    refresh_interval: RefreshInterval = 100
    adaptive_refresh: Annotated[
        float | None,
        SHARE,
        "a threshold in (0, 1], for selections by norms: the interval doubles whenever the choices of the last five"
        " refreshes overlapped this much, on average and above chance (0.4 in Q-GaLore)",
    ] = None
    max_refresh_interval: Annotated[
        int | None, COUNT, "the longest it becomes; default 16 times ``refresh_interval``"
    ] = None
    moments: Annotated[
        Moments,
        "at a refresh, ``reset`` as the paper, or ``carry``: entries that stay keep m and v, new ones get m = 0 and the"
        " mean v of the layer's kept ones, and the step count goes on. Not with ``multinomial_replacement``,"
        " ``AdamW8bit`` and ``Adafactor``, with ``NorMuon`` for columns only",
    ] = "reset"
    decay: Annotated[
        Decay | None,
        "``active`` decays the selected entries. ``all`` also decays the others: their factor is accumulated and"
        " applied when the subspace changes, with stochastic rounding in bf16 (step by step it would round to nothing)."
        " Until then evaluation and checkpoints see them without it. None is ``active``; with"
        " ``multinomial_replacement`` it is ``all``, there applied at each step, and the only one allowed",
    ] = None
    vocabulary: Annotated[
        Vocabulary,
        "``rows`` also selects rows, that is tokens, of the LM head and the embedding, with the same density (for"
        " ``rank``: ``rank / n``) and by the same rule; they are trained at ``lr``. Tied ones stay dense. Not with"
        " ``multinomial_replacement``",
    ] = "dense"

    @property
    def repeats(self) -> bool:
        """Whether columns or rows are drawn with replacement."""
        return SELECTION_RULES[self.selection].repeats

    def _conflicts(self) -> Iterator[str]:
        yield from one_given(self, ("rank", "density", "budget"))
        yield from super()._conflicts()
        yield from self._conflicts_of_refresh()
        if self.repeats:
            yield from self._conflicts_of_repeats()
        if self.strata > 1:
            yield from self._conflicts_of_strata()
        if isinstance(self.shared_inputs, list) and self.side == "rows":
            yield f"shared_inputs: expected side 'columns' with {self.shared_inputs!r}, got side {self.side!r}"
        if self.base in ("Muon", "NorMuon") and self.vocabulary == "rows":
            yield f"vocabulary: expected 'dense' with base {self.base}, which is for matrices, got 'rows'"
        if self.moments == "carry" and self.base == "NorMuon" and self.side == "rows":
            yield "moments: expected 'reset' with base 'NorMuon' and side 'rows', whose outputs change, got 'carry'"
        if self.moments == "carry" and self.base in ("AdamW8bit", "Adafactor"):
            yield f"moments: expected 'reset' with base {self.base!r}, got 'carry'"

    def _conflicts_of_strata(self) -> Iterator[str]:
        given = {"budget": self.budget is not None, "vocabulary": self.vocabulary != "dense", "selection": self.repeats}
        for key in (key for key, is_given in given.items() if is_given):
            yield f"strata: expected 1 with {key} {getattr(self, key)!r}, got {self.strata}"
        if self.rank is not None and self.rank % self.strata:
            yield f"strata: expected a divisor of rank {self.rank}, got {self.strata}"

    def _conflicts_of_refresh(self) -> Iterator[str]:
        if self.decay == "all" and self.refresh_interval is None and not self.repeats:
            yield "decay: 'all' takes effect at a refresh: expected a refresh_interval, got None"
        if self.adaptive_refresh is None:
            if self.max_refresh_interval is not None:
                yield f"max_refresh_interval: expected None without adaptive_refresh, got {self.max_refresh_interval}"
            return
        if self.refresh_interval is None or not SELECTION_RULES[self.selection].uses_norms:
            yield (
                "adaptive_refresh: expected a refresh_interval and a selection by norms, got"
                f" {self.refresh_interval} and {self.selection!r}"
            )
        elif self.max_refresh_interval is not None and self.max_refresh_interval < self.refresh_interval:
            yield (
                f"max_refresh_interval: expected at least refresh_interval, {self.refresh_interval}, got"
                f" {self.max_refresh_interval}"
            )

    def _conflicts_of_repeats(self) -> Iterator[str]:
        selection = f"selection {self.selection!r}"
        if self.decay == "active":
            yield f"decay: expected 'all' with {selection}, got 'active'"
        if self.moments == "carry":
            yield f"moments: expected 'reset' with {selection}, got 'carry'"
        if isinstance(self.shared_inputs, list):
            yield f"shared_inputs: expected None or 'siblings' with {selection}, got {self.shared_inputs!r}"
        if self.vocabulary == "rows":
            yield f"vocabulary: expected 'dense' with {selection}, got 'rows'"
        if self.base not in ("AdamW", "AdamW8bit"):
            yield f"base: expected 'AdamW' or 'AdamW8bit' with {selection}, got {self.base!r}"
