"""Finding the linear layers of a model that become compact, and converting them."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .compact import CompactWeight


@dataclass(frozen=True)
class CompactLayer:
    """A converted layer and the name it has in its model."""

    name: str
    module: CompactWeight


def rank_of(dim: int, *, rank: int | None, density: float | None) -> int:
    """The number of selected columns or rows out of ``dim``: ``rank``, or ``density * dim`` rounded, at least 1."""
    if rank is not None:
        return rank
    assert density is not None
    return max(1, round(density * dim))


def refuse_wrapped(model: nn.Module, *, in_engine: bool) -> None:
    """Raise if DDP, FSDP, DeepSpeed or ``torch.compile`` already holds the model's old parameters.

    Parameters made after the wrapping would be invisible to it: DDP then leaves each rank with its own gradient and
    says nothing.

    Args:
        in_engine: an engine makes the optimizer, and can deal with parameters made under ``deepspeed.zero.Init``.

    Raises:
        ValueError: naming the wrapper.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model itself is needed, not its parameters; a {type(model).__name__} was given")
    wrapper = next(wrappers_of(model), None)
    if wrapper is not None:
        raise ValueError(
            f"the model is already wrapped by {wrapper}: create the optimizer first, then wrap the model with"
            " DistributedDataParallel or torch.compile; under DeepSpeed use narrowgauge.engine.initialize"
        )
    if not in_engine and any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError("the model was built under deepspeed.zero.Init: use narrowgauge.engine.initialize")


def wrappers_of(model: nn.Module) -> Iterator[str]:
    """The names of what has wrapped the model: DDP, FSDP, DeepSpeed, ``torch.compile``."""
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
    if any(isinstance(module, CompactWeight) for module in model.modules()):
        raise ValueError("the model already has compact layers: it belongs to another optimizer of this kind")
    if patterns is None:
        blocks = block_prefixes(model)
        matched = {name: m for name, m in linears.items() if name.startswith(blocks)}
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
    shown = list(linears)[:8]
    return f"The model's linears: {', '.join(shown)}{f', ... ({len(linears)} in all)' if len(linears) > 8 else ''}"
