"""Modules that ZeRO-3 gathers at once, with all below them."""

from deepspeed.utils import set_z3_leaf_module
from torch import nn

from narrowgauge.optimizers.layers.shape import whole_shape


def gather_stacks_at_once(model: nn.Module) -> None:
    """Let ZeRO-3 look at modules of stacked matrices, as experts are, from the outside only.

    transformers' loop over experts (``experts_implementation="eager"``) calls the activation once for each expert that
    has tokens on this rank. ZeRO-3 records every call of a module, and ends a run whose ranks differ in them
    ("Detected a disagreement on list length"), although an activation has nothing to gather.
    """
    for module in model.modules():
        own = {id(p) for p in module.parameters(recurse=False)}
        has_stack = any(len(whole_shape(p)) == 3 for p in module.parameters(recurse=False))
        if has_stack and next(module.children(), None) is not None and {id(p) for p in module.parameters()} == own:
            set_z3_leaf_module(module, True)
