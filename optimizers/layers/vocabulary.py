"""The layers whose rows stand for tokens."""

import warnings
from collections import Counter

from torch import nn

from .registry import is_target, outputs_and_inputs
from .targets import block_prefixes


def find_vocabulary(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """The LM heads and embeddings: a linear outside of the blocks and an embedding with as many rows as each other.

    A weight that both use, or that another layer does, is left alone with a warning, as are frozen ones, and embeddings
    with ``max_norm``, ``scale_grad_by_freq`` or ``sparse``.

    Raises:
        ValueError: there are none at all.
    """
    blocks = block_prefixes(model)
    outside = {name: module for name, module in model.named_modules() if not name.startswith(blocks)}
    heads = {name: module for name, module in outside.items() if is_target(module)}
    embeddings = {name: module for name, module in outside.items() if type(module) is nn.Embedding}
    sizes = {outputs_and_inputs(m)[0] for m in heads.values()} & {m.num_embeddings for m in embeddings.values()}
    found: dict[str, nn.Linear | nn.Embedding] = {
        **{name: module for name, module in embeddings.items() if module.num_embeddings in sizes},
        **{name: module for name, module in heads.items() if outputs_and_inputs(module)[0] in sizes},
    }
    if not found:
        raise ValueError(
            "vocabulary: 'rows' expected an nn.Linear outside of the blocks with as many outputs as an nn.Embedding has"
            " tokens, got none"
        )
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    unfit = {name: "is tied" for name, module in found.items() if uses[id(module.weight)] > 1}
    for name, module in found.items():
        if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
            unfit[name] = "has max_norm, scale_grad_by_freq or sparse"
    for name, why in unfit.items():
        warnings.warn(f"vocabulary: the weight of {name} {why} and stays dense", stacklevel=4)
    return {name: m for name, m in found.items() if name not in unfit and m.weight.requires_grad}
