"""The optimizers that update compact parameters: torch's, bitsandbytes' with 8-bit moments, and Muon."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sharding.shards import ShardMap
from .matrices import Matrices
from .muon import NEURONS, Muon
from .options import CompactOptions


def make_base(
    groups: Sequence[dict[str, Any]],
    options: CompactOptions,
    *,
    matrices: Callable[[], Mapping[str, Matrices]],
    shards: Callable[[], ShardMap],
) -> torch.optim.Optimizer:
    """The optimizer ``options.base`` on parameter groups.

    Args:
        matrices: finds those in the parameters of the groups that are not ``dense``, by name; experts are tried for it.
        shards: how parameters are cut, once they are.

    Raises:
        ValueError: a group has options that its optimizer does not have.

    ``Adafactor`` is torch's (Shazeer and Stern, 2018, arXiv 1804.04235), which keeps no first moment and has other
    epsilons: ``betas`` and ``eps`` are not used by it.
    """
    lr, weight_decay = options.lr, options.weight_decay
    if options.base == "Adafactor":
        return torch.optim.Adafactor(groups, lr=lr, weight_decay=weight_decay, foreach=options.foreach)
    adam: dict[str, Any] = {"lr": lr, "betas": options.betas, "eps": options.eps, "weight_decay": weight_decay}
    if options.base == "AdamW8bit":
        return _bitsandbytes().optim.AdamW8bit(groups, **adam)
    if options.base in ("Muon", "NorMuon"):
        return _muon(groups, options, adam, matrices(), shards)
    return torch.optim.AdamW(groups, **adam, foreach=options.foreach, fused=options.fused)


def _muon(
    groups: Sequence[dict[str, Any]],
    options: CompactOptions,
    adam: dict[str, Any],
    matrices: Mapping[str, Matrices],
    shards: Callable[[], ShardMap],
) -> Muon:
    for group in groups:
        if group["kind"] != "dense" and (unused := sorted({"betas", "eps"} & group.keys())):
            raise ValueError(
                f"param_groups: expected no {unused} for the matrices with base {options.base}, which has momentum"
            )
    neuron_beta = 0.95 if options.neuron_beta is None else options.neuron_beta
    return Muon(
        groups,
        adam={**adam, "foreach": options.foreach},
        matrices=matrices,
        shards=shards,
        momentum=0.95 if options.momentum is None else options.momentum,
        nesterov=options.nesterov is not False,
        adjust_lr_fn=options.adjust_lr_fn or "match_rms_adamw",
        neuron_beta=neuron_beta if options.base == "NorMuon" else None,
        dtype=torch.bfloat16 if options.orthogonalized_in == "bfloat16" else None,
    )


def forget_moments_(base: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Moments and step count of one tensor as they are before its first step."""
    if isinstance(base, torch.optim.AdamW | Muon):
        for value in state.values():
            for tensor in value.values() if isinstance(value, dict) else (value,):
                tensor.zero_()
    else:
        # Made anew by the next step.
        state.clear()


def has_dense_state(base: torch.optim.Optimizer) -> bool:
    """Whether it keeps its moments as :func:`dense_state` has them."""
    return not hasattr(base, "name2qmap")


def dense_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of one tensor with 8-bit moments in fp32 and without what belongs to their form; of others what is a
    number or shaped like the tensor.
    """
    if "qmap1" not in state:
        return {key: value for key, value in state.items() if key != NEURONS}
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
    return importlib.import_module("bitsandbytes")
