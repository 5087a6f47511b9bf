"""Weights from scratch without a model that holds them: each exists as a whole only while its module is drawn."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..first_weights import draw_weights, undrawn

Sink = Callable[[str, Tensor], None]
"""Takes a whole weight under Hugging Face's name."""


def shapes_of(model_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's weights, each tied one once, in transformers' order."""
    return {name: tuple(p.shape) for name, p in _without_values(model_config, torch.float32).named_parameters()}


def _without_values(model_config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    with undrawn(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)


def draw_into(
    model_config: PretrainedConfig, dtype: torch.dtype, seed: int, wanted: Container[str], sink: Sink
) -> None:
    """Draw the weights of a model from scratch and hand each that is wanted to ``sink``, whole."""
    model = _without_values(model_config, dtype)
    shapes = _emptied(model)
    names = {id(p): name for name, p in model.named_parameters()}
    always = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    @contextmanager
    def whole(parameters: Sequence[Tensor]) -> Iterator[None]:
        needed = any(names[id(p)] in wanted or id(p) in always for p in parameters)
        made = list(parameters) if needed else []
        for p in made:
            # A rule that leaves a tensor alone leaves this mark.
            p.data = torch.full(shapes[id(p)], torch.nan, dtype=dtype)
        yield
        for p in made:
            if not bool(torch.isnan(p.data).all()):
                sink(names[id(p)], p.data)
            p.data = torch.empty(0, dtype=dtype)

    draw_weights(model, seed, whole)  # pyright: ignore[reportArgumentType]


def _emptied(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Replace parameters without storage by empty ones on the CPU; returns the shapes, by the new ones' ids."""
    made: dict[int, nn.Parameter] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty(0, dtype=parameter.dtype))
                shapes[id(made[id(parameter)])] = tuple(parameter.shape)
            module._parameters[key] = made[id(parameter)]
    return shapes
