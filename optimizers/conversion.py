"""Finding the linear layers of a model that become compact, and converting them."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .compact_linear import CompactLinear, Side
from .selection import SelectionRule, select_index


@dataclass(frozen=True)
class CompactLayer:
    """A converted layer and the name it has in its model."""

    name: str
    module: CompactLinear


def rank_of(dim: int, *, rank: int | None, density: float | None) -> int:
    """The number of selected columns or rows out of ``dim``: ``rank``, or ``density * dim`` rounded, at least 1."""
    if rank is not None:
        return rank
    assert density is not None
    return max(1, round(density * dim))


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if DDP, FSDP, DeepSpeed or ``torch.compile`` already holds the model's old parameters.

    Parameters made after the wrapping would be invisible to it: DDP then leaves each rank with its own gradient and
        says nothing.

    Raises:
        ValueError: naming the wrapper.
    """
    wrapper = next(_wrappers_of(model), None)
    if wrapper is not None:
        raise ValueError(
            f"the model is already wrapped by {wrapper}: create the optimizer first, then wrap the model with"
            " DistributedDataParallel or torch.compile; under DeepSpeed use narrowgauge.engine.initialize"
        )


def _wrappers_of(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        if _is_wrapper(module):
            yield type(module).__name__
        if getattr(module, "_compiled_call_impl", None) is not None:
            yield "torch.compile"
        if any(
            type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor"
            for p in module._parameters.values()
            if p is not None
        ):
            yield "fully_shard"
    # The user may hand over what is inside the wrapper (`ddp.module`): only the wrapper knows of itself.
    for holder in gc.get_objects():
        if _is_wrapper(holder) and any(child is model for child in holder._modules.values()):
            yield type(holder).__name__


_WRAPPER_NAMES = {"DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule", "DeepSpeedEngine"}


def _is_wrapper(candidate: Any) -> bool:
    return any(cls.__name__ in _WRAPPER_NAMES for cls in type(candidate).__mro__) and "_modules" in getattr(
        candidate, "__dict__", {}
    )


_DEFAULT = "the default (linears inside blocks, the elements of an nn.ModuleList or nn.Sequential)"


def find_targets(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Linear]:
    """The plain, trainable, untied ``nn.Linear`` layers that ``patterns`` name.

    Args:
        patterns: globs over module names (``"*.mlp.*_proj"``); None takes every linear inside a transformer block,
            that is below an element of an ``nn.ModuleList`` or ``nn.Sequential``.

    Raises:
        ValueError: a pattern, or the default, matches nothing; the message lists the model's linears.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if any(isinstance(module, CompactLinear) for module in model.modules()):
        raise ValueError("the model already has compact layers: it belongs to another optimizer of this kind")
    if patterns is None:
        blocks = _block_prefixes(model)
        matched = {name: m for name, m in linears.items() if any(name.startswith(prefix) for prefix in blocks)}
    else:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in linears):
                raise ValueError(f"target_modules: {pattern!r} matches no nn.Linear. {_linears_of(model, linears)}")
        matched = {name: m for name, m in linears.items() if any(fnmatchcase(name, p) for p in patterns)}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    targets = {name: m for name, m in matched.items() if m.weight.requires_grad and uses[id(m.weight)] == 1}
    if not targets:
        raise ValueError(
            "target_modules: no trainable nn.Linear with a weight of its own matches"
            f" {_DEFAULT if patterns is None else list(patterns)}."
            f" {_linears_of(model, linears)}"
        )
    return targets


def _block_prefixes(model: nn.Module) -> list[str]:
    return [
        f"{name}.{key}." if name else f"{key}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for key in module._modules
    ]


def _linears_of(model: nn.Module, linears: dict[str, nn.Linear]) -> str:
    if not linears:
        others = Counter(
            type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None
        )
        return f"The model has no nn.Linear; its layers with parameters are {dict(others)}"
    shown = list(linears)[:8]
    return f"The model's linears: {', '.join(shown)}{f', ... ({len(linears)} in all)' if len(linears) > 8 else ''}"


def check_ranks(
    targets: dict[str, nn.Linear], *, rank: int | None, density: float | None, side: Side
) -> dict[str, int]:
    """The rank of each target.

    Raises:
        ValueError: a rank is above its layer's selected dimension.
    """
    dims = {name: _selected_dim(linear, side) for name, linear in targets.items()}
    ranks = {name: rank_of(dim, rank=rank, density=density) for name, dim in dims.items()}
    too_small = {name: dim for name, dim in dims.items() if ranks[name] > dim}
    if too_small:
        name, dim = min(too_small.items(), key=lambda item: item[1])
        what = "columns (in_features)" if side == "columns" else "rows (out_features)"
        others = f" and the dimension of {len(too_small) - 1} other layers" if len(too_small) > 1 else ""
        raise ValueError(f"rank: {rank} is above the {dim} {what} of {name!r}{others}; at most {dim} fits every layer")
    return ranks


def _selected_dim(linear: nn.Linear, side: Side) -> int:
    m, n = getattr(linear.weight, "ds_shape", linear.weight.shape)
    return n if side == "columns" else m


def convert(
    targets: dict[str, nn.Linear],
    *,
    rank: int | None,
    density: float | None,
    side: Side,
    rule: SelectionRule,
    seed: int,
) -> tuple[list[CompactLayer], list[str]]:
    """Convert the targets whose rank is below the selected dimension.

    Returns:
        The compact layers, with ``compact`` still to be filled, and the names of the layers left as they are because
        the rank equals the dimension: their subspace is everything.

    Raises:
        ValueError: the rank is above a layer's selected dimension; nothing has been converted then.
    """
    ranks = check_ranks(targets, rank=rank, density=density, side=side)
    layers, full = [], []
    for name, linear in targets.items():
        dim = _selected_dim(linear, side)
        if ranks[name] == dim:
            full.append(name)
            continue
        index = select_index(rule, dim, ranks[name], seed=seed, refresh=0, name=name)
        module = CompactLinear.convert(linear, side=side, index=index, contiguous=rule.contiguous)
        layers.append(CompactLayer(name, module))
    return layers, full
