"""Checks of options that several optimizers have."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is an int or float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_pair_of_betas(value: Any) -> bool:
    """Whether a value is two numbers in [0, 1)."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_number(b) and 0.0 <= b < 1.0 for b in value)


def check_number(
    options: Mapping[str, Any],
    key: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise unless ``options[key]`` is a finite number within the bounds.

    Raises:
        ValueError: naming the option, what was found and what is needed.
    """
    value = options[key]
    if not (is_number(value) and math.isfinite(value) and value >= at_least and above < value < below):
        bounds = {"at least": at_least, "above": above, "below": below}
        needed = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        raise ValueError(f"{key}: {value!r} found, a number {needed} is needed")


def check_count(options: Mapping[str, Any], key: str, *, optional: bool = False) -> None:
    """Raise unless ``options[key]`` is an integer of at least 1, or None where that is allowed.

    Raises:
        ValueError: naming the option, what was found and what is needed.
    """
    value = options[key]
    if optional and value is None:
        return
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ValueError(f"{key}: {value!r} found, an integer of at least 1{' or None' if optional else ''} is needed")


def check_share(options: Mapping[str, Any], key: str) -> None:
    """Raise unless ``options[key]`` is a number in (0, 1] or None.

    Raises:
        ValueError: naming the option, what was found and what is needed.
    """
    value = options[key]
    if value is not None and not (is_number(value) and 0.0 < value <= 1.0):
        raise ValueError(f"{key}: {value} found, a number in (0, 1] is needed")


def check_one_given(options: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise unless exactly one of ``options[key]`` is not None.

    Raises:
        ValueError: naming the options and what was found.
    """
    if sum(options[key] is not None for key in keys) != 1:
        found = ", ".join(f"{key}={options[key]}" for key in keys)
        raise ValueError(f"give exactly one of {', '.join(keys[:-1])} and {keys[-1]}; found {found}")


def check_choice(options: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> None:
    """Raise unless ``options[key]`` is one of ``allowed``.

    Raises:
        ValueError: naming the option, what was found and what is needed.
    """
    if options[key] not in allowed:
        raise ValueError(f"{key}: {options[key]!r} found, one of {list(allowed)} is needed")


def check_adam(options: Mapping[str, Any]) -> None:
    """Check ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``matrix_lr_scale``.

    Raises:
        ValueError: naming the option, what was found and what is needed.
    """
    for key in ("lr", "eps", "weight_decay"):
        check_number(options, key, at_least=0.0)
    if not is_pair_of_betas(options["betas"]):
        raise ValueError(f"betas: {options['betas']!r} found, two numbers in [0, 1) are needed")
    check_number(options, "matrix_lr_scale", above=0.0)
