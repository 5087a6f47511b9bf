"""Which linear layers read the same input, so that one choice of columns, and one copy of them, serves all."""

from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from ..layers.registry import outputs_and_inputs

SharedInputs = Literal["siblings"] | list[list[str]] | None

# Names of siblings that transformers call with the same input: Llama and its kin, T5, BERT, ours.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


def find_groups(targets: dict[str, nn.Linear], shared_inputs: SharedInputs) -> list[list[str]]:
    """The groups of two or more targets that share an input: children of one module, of one input width.

    That they are called with the same tensor is not relied on: where they are not, only their choice is the same.

    Args:
        shared_inputs: ``siblings`` goes by known names; globs over module names say which siblings are meant.

    Raises:
        ValueError: globs that match no two siblings, or siblings of several input widths.
    """
    if shared_inputs is None:
        return []
    groups: list[list[str]] = []
    taken: set[str] = set()
    for position, patterns in enumerate(_SIBLINGS if shared_inputs == "siblings" else shared_inputs):
        found: dict[str, list[str]] = {}
        for name in targets:
            parent, _, own = name.rpartition(".")
            matches = own in patterns if shared_inputs == "siblings" else any(fnmatchcase(name, p) for p in patterns)
            if matches and name not in taken:
                found.setdefault(parent, []).append(name)
        siblings = [names for names in found.values() if len(names) > 1]
        for names in siblings:
            widths = {name: outputs_and_inputs(targets[name])[1] for name in names}
            if len(set(widths.values())) == 1:
                groups.append(names)
                taken.update(names)
            elif shared_inputs != "siblings":
                raise ValueError(f"shared_inputs[{position}]: expected layers of one input width, got {widths}")
        if not siblings and shared_inputs != "siblings":
            raise ValueError(f"shared_inputs[{position}]: {list(patterns)} matches no two layers of one module")
    return groups
