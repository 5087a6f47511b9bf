"""Whether an experts module computes what its compact form would: both are run, at a small size."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .experts import CompactExperts, CompactLlama4Experts, CompactSortedExperts, ExpertsMatrices
from .shape import whole_shape

_WIDTH, _HIDDEN, _TOKENS, _CHOICES = 6, 4, 16, 3
# By its name, what a module may keep of its own size.
_SIZES = {
    **dict.fromkeys(("hidden_size", "hidden_dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "intermediate_dim", "expert_dim"), _HIDDEN),
}
# Wide enough that gates are clamped.
_SCALE = 3.0


def computes_the_same(targets: list[ExpertsMatrices]) -> bool:
    """Compare outputs and gradients of a small copy of a module, in fp64, with those of its compact form.

    What the module has beside its matrices, its activation and limits, is its own.

    Args:
        targets: all stacked parameters of one module, ``down_proj`` last.
    """
    module, experts = targets[0].module, targets[0].experts
    plain, compact = _small(targets), _small(targets)
    for target in targets:
        own = ExpertsMatrices(compact, target.key, target.transposed, experts)
        index = torch.arange(own.outputs_and_inputs[1])
        unit = own.to_selected(side="columns", index=index, contiguous=False)
        unit.compact.data.copy_(unit.compact_of(unit.weight))
    forward: Any = type(module).forward
    # What transformers dispatches from is a loop over the experts that says what the model is.
    forward = getattr(forward, "__wrapped__", forward)
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = list(plain._parameters)
            wanted = _run(lambda *inputs: forward(plain, *inputs), plain, names, experts)
            trained = [f"{name}_compact" if name in compact.stacked else name for name in names]
            found = _run(compact, compact, trained, experts)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return False
    return all(_agree(a, b) for a, b in zip(wanted, found, strict=True))


def _agree(a: Tensor, b: Tensor) -> bool:
    """Up to rounding, where parts are computed in fp32 too."""
    return a.numel() == b.numel() and bool((a - b.view_as(a)).abs().max() <= 1e-5 * a.abs().max())


def _small(targets: list[ExpertsMatrices]) -> Any:
    """A copy of the module with small matrices, random but always the same."""
    module, draw = targets[0].module, _drawing(0)
    small: Any = object.__new__(type(module))
    sizes = {key: value for key, value in _SIZES.items() if isinstance(vars(module).get(key), int)}
    small.__dict__.update(vars(module) | sizes)
    small._parameters = {}
    for target in targets:
        num, inputs = target.num_matrices, _HIDDEN if target.key == "down_proj" else _WIDTH
        outputs = {"gate_up_proj": 2 * _HIDDEN, "up_proj": _HIDDEN, "down_proj": _WIDTH, "weight": _HIDDEN}[target.key]
        shapes: dict[str, tuple[int, ...]] = {
            target.key: (num, inputs, outputs) if target.transposed else (num, outputs, inputs)
        }
        if f"{target.key}_bias" in module._parameters:
            shapes[f"{target.key}_bias"] = (num, outputs)
        small._parameters.update({key: nn.Parameter(draw(*shape)) for key, shape in shapes.items()})
    return small


def _run(
    call: Callable[..., Tensor], module: nn.Module, names: list[str], experts: type[CompactExperts]
) -> list[Tensor]:
    """Outputs, and gradients of inputs and of parameters of these names."""
    draw, parameters = _drawing(1), [getattr(module, name) for name in names]
    num = whole_shape(next(iter(module._parameters.values())))[0]  # pyright: ignore[reportArgumentType]
    rows = num if experts is CompactLlama4Experts else _TOKENS
    inputs, told = [draw(rows, _WIDTH).requires_grad_()], list[Any]()
    if experts is CompactSortedExperts:
        told = [[len(part) for part in torch.arange(rows).tensor_split(num)]]
    elif experts is CompactExperts:
        choices = torch.argsort(draw(rows, num).abs(), dim=1)[:, : min(num, _CHOICES)]
        inputs.append(draw(*choices.shape).requires_grad_())
        told = [choices, inputs[1]]
    y = call(inputs[0], *told)
    return [y, *torch.autograd.grad(y, [*inputs, *parameters], draw(*y.shape))]


def _drawing(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * _SCALE
