"""The optimizers that update compact parameters: torch's, and bitsandbytes' with 8-bit moments."""

import importlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

BaseName = Literal["AdamW", "AdamW8bit", "Adafactor"]


def check_base(base: str, *, foreach: bool | None = None, fused: bool | None = None) -> None:
    """Check the name of a base, and that it takes the options.

    Raises:
        ValueError: naming the option, what was found and what is allowed.
    """
    if base not in get_args(BaseName):
        raise ValueError(f"base: {base!r} found, one of {list(get_args(BaseName))} is needed")
    if foreach and fused:
        raise ValueError("fused: found with foreach; one of the two is allowed")
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

    ``Adafactor`` is torch's (Shazeer and Stern, 2018, arXiv 1804.04235), which keeps no first moment and has other
    epsilons: ``betas`` and ``eps`` are not used by it.

    Raises:
        ValueError: a group sets an option that the base does not have.
    """
    if base == "Adafactor":
        unused = sorted({"betas", "eps"} & {key for group in groups for key in group})
        if unused:
            raise ValueError(f"param_groups: {unused} found with base Adafactor, which does not have them")
    if base == "AdamW8bit":
        return _bitsandbytes().optim.AdamW8bit(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if base == "Adafactor":
        return torch.optim.Adafactor(groups, lr=lr, weight_decay=weight_decay, foreach=foreach)
    return torch.optim.AdamW(
        groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach, fused=fused
    )


def dense_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of one tensor with 8-bit moments in fp32 and without what belongs to their form; others as they are."""
    if "qmap1" not in state:
        return state
    return {"step": state["step"], **{key: _dequantized(state, key) for key in _MOMENTS}}


def quantize_state_(base: Any, state: dict[str, Any]) -> None:
    """Turn a :func:`dense_state` into the form that bitsandbytes' ``base`` has for a tensor of this size, in place.

    Does nothing if there are no moments yet.
    """
    if any(state[key].numel() < base.args.min_8bit_size for key in _MOMENTS if key in state):
        return
    for key in _MOMENTS & state.keys():
        code = base.name2qmap[_CODES[key]].to(state[key].device)
        functional = _bitsandbytes().functional
        quantized, form = functional.quantize_blockwise(state[key].float(), code=code, blocksize=_BLOCK_SIZE)
        number = key.removeprefix("state")
        state |= {key: quantized, f"qmap{number}": code, f"absmax{number}": form.absmax}


# bitsandbytes' names of the moments, of the tables of their 8-bit values, and the elements that share a scale.
_CODES = {"state1": "dynamic", "state2": "udynamic"}
_MOMENTS = _CODES.keys()
_BLOCK_SIZE = 256


def _dequantized(state: dict[str, Any], key: str) -> Tensor:
    number = key.removeprefix("state")
    return _bitsandbytes().functional.dequantize_blockwise(
        state[key], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=_BLOCK_SIZE
    )


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            "base: 'AdamW8bit' found, which needs bitsandbytes: pip install 'narrowgauge[8bit]'"
        ) from error
