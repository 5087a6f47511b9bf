"""What may have wrapped a model already: the parameters that an optimizer makes would be invisible to it."""

import gc
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def refuse_wrapped(model: nn.Module, *, in_engine: bool) -> None:
    """Raise if DDP, FSDP, an engine or ``torch.compile`` already holds the model's old parameters.

    Parameters made after the wrapping would be invisible to it: DDP then leaves each rank with its own gradient and
    says nothing.

    Args:
        in_engine: an engine makes the optimizer, and can deal with parameters that it keeps in parts.

    Raises:
        ValueError: naming the wrapper.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected the model itself, not its parameters, got a {type(model).__name__}")
    wrapper = next(wrappers_of(model), None)
    if wrapper is not None:
        raise ValueError(
            f"the model is already wrapped by {wrapper}: create the optimizer first, then wrap the model with"
            " DistributedDataParallel or torch.compile, or give both to an engine"
        )
    if not in_engine and any(p.numel() == 0 for p in model.parameters()):
        raise ValueError("the model has empty parameters: it was built in parts, let that engine make the optimizer")


def wrappers_of(model: nn.Module) -> Iterator[str]:
    """The names of what has wrapped the model: DDP, FSDP, an engine, ``torch.compile``."""
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
        # The quick question first, there may be a million of them.
        if (
            issubclass(type(holder), nn.Module)
            and _is_wrapper(holder)
            and any(child is model for child in holder._modules.values())
        ):
            yield type(holder).__name__


_WRAPPER_NAMES = {"DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"}


def _is_wrapper(candidate: Any) -> bool:
    cls = type(candidate)
    named = any(base.__name__ in _WRAPPER_NAMES for base in cls.__mro__)
    # A module that runs backward and steps an optimizer is an engine.
    engine = nn.Module in cls.__mro__ and hasattr(cls, "backward") and hasattr(cls, "step")
    return (named or engine) and "_modules" in getattr(candidate, "__dict__", {})


def ddp_around(groups: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Each DistributedDataParallel that holds a parameter of the groups."""
    own = {id(p) for group in groups for p in group["params"]}
    for holder in gc.get_objects():
        is_ddp = DistributedDataParallel in type(holder).__mro__ and "_modules" in holder.__dict__
        if is_ddp and any(id(p) in own for p in holder.parameters()):
            yield holder
