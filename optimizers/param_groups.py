"""Parameter groups: compact and dense parameters apart, with the user's own groups by name within each."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .layers.targets import CompactLayer
from .options import Options


def build_groups(
    model: nn.Module,
    layers: Sequence[CompactLayer],
    full_rank: Sequence[str],
    options: Options,
    *,
    dense_rate: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups for ``torch.optim``, each with a ``kind``: ``compact``, ``matrix`` or ``dense``.

    Parameters whose gradients other process ranks average, as an engine's experts' (``allreduce`` is False), have
    groups of their own.

    ``matrix`` holds the targeted weights whose rank is their whole dimension: trained whole, at the compact
    parameters' rate.

    Args:
        options: ``lr``, ``matrix_lr_scale`` and ``param_groups`` are used; a compact parameter goes by the name of its
            weight in the latter.
        dense_rate: names of layers whose compact parameters are trained at the dense parameters' rate.

    Raises:
        ValueError: globs that match no trainable parameter.
    """
    specs = options.param_groups
    compact_names = {layer.compact_name: layer.weight_name for layer in layers}
    # Of experts, what is trained whole is named itself.
    matrices = {*full_rank, *(f"{name}.weight" for name in full_rank)}
    unscaled = {f"{name}.weight" for name in dense_rate}
    members: dict[tuple[str, int, bool, bool], list[nn.Parameter]] = {}
    for own_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = compact_names.get(own_name, own_name)
        kind = "compact" if own_name in compact_names else "matrix" if name in matrices else "dense"
        matching = (i for i, spec in enumerate(specs) if any(fnmatchcase(name, glob) for glob in spec["params"]))
        at_dense_rate = kind == "dense" or name in unscaled
        is_expert = not getattr(parameter, "allreduce", True)
        members.setdefault((kind, next(matching, -1), at_dense_rate, is_expert), []).append(parameter)
    for position, spec in enumerate(specs):
        if not any(found == position for _, found, _, _ in members):
            raise ValueError(f"param_groups[{position}]: {spec['params']} matches no trainable parameter of its own")
    groups = []
    for key in sorted(members):
        kind, position, at_dense_rate, _ = key
        own = {key: value for key, value in specs[position].items() if key != "params"} if position >= 0 else {}
        group_lr = own.get("lr", options.lr) * (1.0 if at_dense_rate else options.matrix_lr_scale)
        groups.append({**own, "params": members[key], "kind": kind, "lr": group_lr})
    return groups
