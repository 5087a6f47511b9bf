"""Finding the linear layers of a model that become compact, and converting them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from .compact import compact_units
from .experts import StackedMatrices
from .find_experts import find_experts
from .registry import is_target
from .unfit import ADAPTER, ALSO_READ, READ, REPLACED, unfit_layers
from .unit import CompactUnit


@dataclass(frozen=True)
class CompactLayer:
    """A compact unit and its name in the model: that of its layer, or of its weight where a module has several."""

    name: str
    module: CompactUnit

    @property
    def weight_name(self) -> str:
        return self._named(self.module.weight_key)

    @property
    def compact_name(self) -> str:
        return self._named(self.module.compact_key)

    def _named(self, key: str) -> str:
        path = self.name.split(".")
        return ".".join([*(path[:-1] if self.module.is_named_by_weight else path), key])


def rank_of(dim: int, *, rank: int | None, density: float | None) -> int:
    """The number of selected columns or rows out of ``dim``: ``rank``, or ``density * dim`` rounded, at least 1."""
    if rank is not None:
        return rank
    assert density is not None
    return max(1, round(density * dim))


_DEFAULT = "the default (linears inside blocks, the elements of an nn.ModuleList or nn.Sequential)"


def find_targets(
    model: nn.Module, patterns: Sequence[str] | None, experts: Mapping[str, StackedMatrices] | None = None
) -> dict[str, nn.Linear | StackedMatrices]:
    """The plain, trainable, untied ``nn.Linear`` layers that ``patterns`` name, those of other registered types, and
    the stacked matrices of experts, by the names of their parameters.

    Args:
        patterns: globs over module names (``"*.mlp.*_proj"``); None takes everything inside a transformer block,
            that is below an element of an ``nn.ModuleList`` or ``nn.Sequential`` and is called (see
            :func:`.unfit_layers`), and is no adapter's.
        experts: the stacks, where they are found already.

    Raises:
        ValueError: a pattern, or the default, matches nothing, or a pattern matches a layer whose ``forward`` was
            replaced; the message lists the model's linears.
    """
    linears = {name: module for name, module in model.named_modules() if is_target(module)}
    if next(compact_units(model), None) is not None:
        raise ValueError(
            "the model already has compact layers: they belong to another optimizer: call its revert() first"
        )
    stacks = find_experts(model) if experts is None else experts
    candidates: dict[str, nn.Linear | StackedMatrices] = {**linears, **stacks}
    if patterns is None:
        blocks = block_prefixes(model)
        matched = {name: m for name, m in candidates.items() if name.startswith(blocks)}
    else:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                raise ValueError(f"target_modules: {pattern!r} matches no nn.Linear. {_linears_of(model, linears)}")
        matched = {name: m for name, m in candidates.items() if any(fnmatchcase(name, p) for p in patterns)}
    unfit = unfit_layers(model, {name: m for name, m in matched.items() if isinstance(m, nn.Module)})
    if patterns is not None:
        replaced = [name for name, why in unfit.items() if why == REPLACED]
        if replaced:
            raise ValueError(f"target_modules: {replaced[0]}: {REPLACED}")
        # Who names a layer knows that it is called, or that it is an adapter's.
        unfit = {name: why for name, why in unfit.items() if why not in (ADAPTER, READ, ALSO_READ)}
    matched = {name: m for name, m in matched.items() if name not in unfit}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    targets = {name: m for name, m in matched.items() if m.weight.requires_grad and uses[id(m.weight)] == 1}
    if not targets:
        raise ValueError(
            "target_modules: no trainable nn.Linear with a weight of its own matches"
            f" {_DEFAULT if patterns is None else list(patterns)}."
            f" {_linears_of(model, linears)}{_told(unfit)}"
        )
    return targets


def find_linears(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Linear]:
    """Of :func:`find_targets` the ``nn.Linear`` layers: without stacked experts, and without layers whose weight is
    inputs times outputs.

    Raises:
        ValueError: the patterns match no such layer.
    """
    found = {name: m for name, m in find_targets(model, patterns, {}).items() if isinstance(m, nn.Linear)}
    if not found:
        raise ValueError("target_modules: expected globs that match an nn.Linear, got none that do")
    return found


def _told(unfit: dict[str, str]) -> str:
    if not unfit:
        return ""
    name, why = next(iter(unfit.items()))
    return f". Left alone: {len(unfit)}, for example {name} ({why})"


def block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of modules inside of blocks, the elements of an ``nn.ModuleList`` or ``nn.Sequential``, begin
    with.
    """
    return tuple(
        f"{name}.{key}." if name else f"{key}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for key in module._modules
    )


def _linears_of(model: nn.Module, linears: dict[str, nn.Linear]) -> str:
    if not linears:
        others = Counter(
            type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None
        )
        return f"The model has no nn.Linear; its layers with parameters are {dict(others)}"
    return f"The model's linears: {shortened(list(linears))}"


def shortened(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return f"{', '.join(names[:8])}{f', ... ({len(names)} in all)' if len(names) > 8 else ''}"
