"""Weights from scratch: by transformers' own rule for each module, in its order, from a seed for each module; or all
from one stream, as transformers draws them.

A rule may write to what lies below its module (GPT-2's attention scales the weights of its output), so children are
drawn before their parents, as transformers does, and a model inside a model has its own rule.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions
from transformers.pytorch_utils import Conv1D

from narrowgauge.optimizers.numerics.seeds import derive_seed

# transformers' own mark: its rules leave such a tensor as it is.
_KEEP = "_is_hf_initialized"

Whole = Callable[[Sequence[Tensor]], AbstractContextManager[Any]]


@contextmanager
def undrawn() -> Iterator[None]:
    """Within it transformers builds models without drawing their weights."""
    drawn = PreTrainedModel._initialize_weights
    PreTrainedModel._initialize_weights = lambda self, *args, **kwargs: None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = drawn


def draw_weights(model: PreTrainedModel, seed: int, whole: Whole) -> None:
    """Draw all weights of a model from scratch.

    Args:
        whole: within it parameters are whole, and what is written to them stays; for parameters that are sharded.
    """
    with torch.no_grad(), guard_torch_init_functions():
        _Drawing(model, seed, whole).visit("", model, model)


def from_one_stream(model_config: PretrainedConfig, seed: int) -> dict[str, Tensor]:
    """The weights of ``torch.manual_seed(seed)`` and ``from_config(model_config)`` in fp32, by all their names.

    Constructors draw too, and all of them before the first rule: the whole model is made, on the CPU.
    """
    torch.manual_seed(seed)
    settings = copy.deepcopy(model_config)  # which a model takes as its own
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False)
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def take_weights(model: nn.Module, values: Mapping[str, Tensor], seed: int, whole: Whole) -> None:
    """Give a model all its weights.

    Args:
        seed: the random numbers after it are those after :func:`draw_weights`.
        whole: as in :func:`draw_weights`.
    """
    with torch.no_grad():
        for module_name, module in model.named_modules():
            own = dict(module.named_parameters(module_name, recurse=False))
            with whole(list(own.values())):
                for name, parameter in own.items():
                    parameter.copy_(values[name])
    # As the rule for the whole model finds it.
    torch.manual_seed(derive_seed(seed, "weights", ""))


class _Drawing:
    def __init__(self, model: PreTrainedModel, seed: int, whole: Whole) -> None:
        self._seed, self._whole = seed, whole
        # The names whose values are another parameter's: it alone is drawn.
        self._tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        self._visited = set[int]()

    def visit(self, name: str, module: nn.Module, owner: PreTrainedModel) -> None:
        """Draw a module and what is below it.

        Args:
            name: of the module.
            owner: the model whose rule it is drawn by.
        """
        if id(module) in self._visited:
            return
        self._visited.add(id(module))
        for child_name, child in module.named_children():
            below = child if isinstance(child, PreTrainedModel) else owner
            self.visit(_join(name, child_name), child, below)
        with self._whole(_reached(module)), self._kept(name, module):
            if isinstance(module, Conv1D):
                self._seeded(name)
                _draw_as_constructed(module)
            self._seeded(name)
            owner._init_weights(module)

    def _seeded(self, name: str) -> None:
        torch.manual_seed(derive_seed(self._seed, "weights", name))

    @contextmanager
    def _kept(self, name: str, module: nn.Module) -> Iterator[None]:
        """Within it parameters that are tied to another module's are not drawn for this one, or for one below it."""
        named = module.named_parameters(remove_duplicate=False)
        tied = list(dict.fromkeys(p for key, p in named if _join(name, key) in self._tied))
        for parameter in tied:
            setattr(parameter, _KEEP, True)
        try:
            yield
        finally:
            for parameter in tied:
                delattr(parameter, _KEEP)


def _draw_as_constructed(module: Conv1D) -> None:
    """What its constructor draws, and no rule of some families': transformers leaves that out for ZeRO-3."""
    nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(module.bias)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _reached(module: nn.Module) -> list[Tensor]:
    """The parameters that a rule for this module may read or write: all below it, short of whole stacks of layers."""
    inner = list(module.modules())
    if any(isinstance(part, nn.ModuleList | PreTrainedModel) for part in inner):
        inner = [module, *module.children()]
    return list(dict.fromkeys(p for part in inner for p in part.parameters(recurse=False)))
