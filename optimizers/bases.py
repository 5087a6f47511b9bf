"""The optimizers that update compact parameters: torch's, and bitsandbytes' with 8-bit moments."""

import importlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

BaseName = Literal["AdamW", "AdamW8bit", "Adafactor"]


def check_base(base: str, *, foreach: bool | None = None, fused: bool | None = None) -> None:
    """Check the name of a base, and that it takes the options.

    Raises:
        ValueError: naming the option, what was found and what is allowed.
    """
    if base not in get_args(BaseName):
        raise ValueError(f"base: {base!r} found, one of {list(get_args(BaseName))} is needed")
    if base != "AdamW" and fused:
        raise ValueError(f"fused: found with base {base}, which has no fused form")
    if base == "AdamW8bit" and foreach:
        raise ValueError("foreach: found with base AdamW8bit, which has no foreach form")
    if base == "AdamW8bit":
        _bitsandbytes()


def make_base(
    base: BaseName,
    groups: Sequence[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    foreach: bool | None,
    fused: bool | None,
) -> torch.optim.Optimizer:
    """The optimizer ``base`` on parameter groups.

    ``Adafactor`` is torch's (Shazeer and Stern, 2018), which keeps no first moment: ``betas`` is not used by it.
    """
    if base == "AdamW8bit":
        return _bitsandbytes().optim.AdamW8bit(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if base == "Adafactor":
        return torch.optim.Adafactor(groups, lr=lr, weight_decay=weight_decay, foreach=foreach)
    return torch.optim.AdamW(
        groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach, fused=fused
    )


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            "base: 'AdamW8bit' found, which needs bitsandbytes: pip install 'narrowgauge[8bit]'"
        ) from error
