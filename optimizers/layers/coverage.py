"""How much of a model's matrices an optimizer trains by its method, and what it trains as AdamW does."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from .compact import CompactModule
from .shape import whole_shape
from .targets import block_prefixes


@dataclass(frozen=True)
class Coverage:
    """Elements of the trained matrices in the blocks.

    Attributes:
        total: in all.
        covered: of the layers that the method is for.
        dense: of the others, by name with ``*`` for numbers, the largest first.
        reasons: why, by the same names, where there is one.
    """

    total: int
    covered: int
    dense: dict[str, int]
    reasons: dict[str, str]

    @property
    def share(self) -> float:
        """Of the elements that are covered; 1 if there are none at all."""
        return self.covered / self.total if self.total else 1.0

    def describe(self, what: str = "compact") -> str:
        """``58.0 of 62.0 M matrix parameters in the blocks are compact (94 %); dense: ...``."""
        percent = _percent(self.covered, self.total)
        told = f"{_millions(self.covered, self.total)} matrix parameters in the blocks are {what} ({percent})"
        if not self.dense:
            return told
        names = list(self.dense)
        shown = [f"{name} ({_percent(self.dense[name], self.total)}{self._reason(name)})" for name in names[:6]]
        return f"{told}; dense: {', '.join(shown)}{f', ... ({len(names)} in all)' if len(names) > 6 else ''}"

    def _reason(self, name: str) -> str:
        return f"; {self.reasons[name]}" if name in self.reasons else ""

    def summary(self) -> dict[str, object]:
        """JSON values."""
        return {"total": self.total, "compact": self.covered, "share": round(self.share, 4), "dense": self.dense}


def coverage_of(model: nn.Module, covered: Collection[str], reasons: Mapping[str, str]) -> Coverage:
    """Count the trained matrices of two and more dimensions, outside of embeddings; stacked biases are vectors.

    Args:
        covered: names of the layers, or parameters, that the method trains.
        reasons: why layers of these names are not.
    """
    blocks, seen = block_prefixes(model), set[int]()
    total = own = 0
    dense: dict[str, int] = {}
    stacked: dict[str, str] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{key}" if module_name else key
            units = module.compact_units() if isinstance(module, CompactModule) else ()
            if any(key == unit.compact_key for unit in units):
                continue
            trained = parameter.requires_grad or any(key == unit.weight_key for unit in units)
            if not trained or not _is_matrix(module, key) or id(parameter) in seen:
                continue
            if blocks and not name.startswith(blocks):
                continue
            seen.add(id(parameter))
            size = math.prod(whole_shape(parameter))
            total += size
            if module_name in covered or name in covered:
                own += size
            else:
                dense[_pattern(name)] = dense.get(_pattern(name), 0) + size
                if len(whole_shape(parameter)) > 2 and not isinstance(module, nn.modules.conv._ConvNd):
                    stacked[_pattern(name)] = "matrices stacked in one parameter, as experts are"
    largest = dict(sorted(dense.items(), key=lambda item: -item[1]))
    return Coverage(total, own, largest, stacked | {_pattern(f"{name}.weight"): why for name, why in reasons.items()})


def _is_matrix(module: nn.Module, key: str) -> bool:
    """Whether a parameter is a matrix, or several; experts' biases are stacked vectors, one beside each matrix."""
    shape = whole_shape(module.get_parameter(key))
    if len(shape) != 2:
        return len(shape) > 2 and math.prod(shape) > max(shape)
    if "bias" not in key:
        return True
    others = (whole_shape(p) for p in module.parameters(recurse=False))
    return not any(len(other) == 3 and other[0] == shape[0] for other in others)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def _millions(part: int, whole: int) -> str:
    return f"{part / 1e6:.1f} of {whole / 1e6:.1f} M" if whole >= 1e6 else f"{part:,} of {whole:,}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.0f} %"
