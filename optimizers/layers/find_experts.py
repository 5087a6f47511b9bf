"""Finding the experts of a model whose stacked matrices can become compact."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .compact import CompactModule
from .experts import (
    CompactExperts,
    CompactLlama4Experts,
    CompactSortedExperts,
    ExpertsMatrices,
    HasStackedMatrices,
    StackedMatrices,
    arguments_of,
)
from .experts_check import computes_the_same
from .shape import whole_shape

_LLAMA_4 = "transformers.models.llama4.modeling_llama4.Llama4TextExperts"
_JETMOE = "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts"
# What transformers' ``use_experts_implementation`` sets.
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def find_experts(model: nn.Module) -> dict[str, StackedMatrices]:
    """The stacked parameters of a model's experts that can become compact, by their names.

    A module is known by its attributes, and only if its own ``forward`` computes what its compact form would; or it
    tells (:class:`.HasStackedMatrices`).
    """
    found: dict[str, StackedMatrices] = {}
    known: dict[Any, bool] = {}
    for name, module in model.named_modules():
        if isinstance(module, HasStackedMatrices):
            targets: Sequence[StackedMatrices] = module.stacked_matrices()
        else:
            own = _targets_of(module)
            targets = own if own and _is_known_or_computes_the_same(own, known) else []
        if targets:
            found.update({f"{name}.{target.key}" if name else target.key: target for target in targets})
    return found


def _is_known_or_computes_the_same(targets: list[ExpertsMatrices], known: dict[Any, bool]) -> bool:
    """As :func:`.computes_the_same`, which takes time: of the layers of one model that are alike one is tried."""
    alike = _makeup(targets[0].module)
    if alike not in known:
        known[alike] = computes_the_same(targets)
    return known[alike]


def _makeup(module: nn.Module | None) -> Any:
    """What a module computes by, all but the values of its parameters: hashable, and equal for modules made alike."""
    if module is None:
        return None
    own = {key: _told_apart(value) for key, value in vars(module).items()}
    own["_parameters"] = tuple(
        (key, p is not None and (whole_shape(p), p.dtype)) for key, p in module._parameters.items()
    )
    own["_modules"] = tuple((key, _makeup(child)) for key, child in module._modules.items())
    return type(module), tuple(own.items())


def _told_apart(value: Any) -> Any:
    """An attribute by its value where that is simple, otherwise by its identity."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    is_empty = isinstance(value, dict | set | list | tuple) and not value
    return type(value) if is_empty else id(value)


def _targets_of(module: nn.Module) -> list[ExpertsMatrices]:
    """A module's stacked parameters, as far as its attributes tell."""
    if isinstance(module, CompactModule) or "forward" in module.__dict__:
        return []
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    experts: type[CompactExperts]
    if name == _LLAMA_4:
        experts, transposed, keys, biases = CompactLlama4Experts, True, ("gate_up_proj", "down_proj"), ()
    elif name == _JETMOE:
        experts, transposed, keys, biases = CompactSortedExperts, False, ("weight",), ()
    elif _is_decorated(module):
        own = vars(module)
        experts, transposed = CompactExperts, own["is_transposed"]
        keys = ("gate_up_proj" if own["has_gate"] else "up_proj", "down_proj")
        biases = tuple(f"{key}_bias" for key in keys) if own["has_bias"] else ()
    else:
        return []
    if set(module._parameters) != {*keys, *biases}:
        return []
    targets = [ExpertsMatrices(module, key, transposed, experts) for key in keys]
    fits = all(len(whole_shape(t.weight)) == 3 and t.weight.dtype in _DTYPES for t in targets)
    return targets if fits else []


def _is_decorated(module: nn.Module) -> bool:
    own = vars(module)
    is_ours = all(isinstance(own.get(flag), bool) for flag in _FLAGS) and hasattr(module, "_apply_gate")
    # Its experts are all here, and nothing comes after them.
    is_plain = is_ours and not own["has_post_expert_norm"] and not own.get("_is_expert_parallel", False)
    return is_plain and len(arguments_of(type(module))) == 3
