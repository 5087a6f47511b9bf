"""Mixtures whose experts take equal shares, so that shapes are known before any token is: for forecasts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import nn

from .keys import MegatronBlock


def even_settings(block: MegatronBlock) -> dict[str, Any]:
    """Of Megatron's configuration: each expert takes an even share of a process rank's choices, or the part of it that
    its capacity leaves.
    """
    capacity = min(1.0, block.expert_capacity_factor or 1.0)
    return {"moe_expert_capacity_factor": capacity, "moe_pad_expert_input_to_capacity": True}


class _Even:
    """Stands for the numbers of tokens of a layer's experts."""

    def __init__(self, num_tokens: int, num_experts: int) -> None:
        self._counts = [num_tokens // num_experts] * num_experts

    def tolist(self) -> list[int]:
        return self._counts


@contextmanager
def even_shares(model: nn.Module) -> Iterator[None]:
    """Within it, experts that run one after the other ask no tensor for the numbers of their tokens; what Megatron
    keeps of a balance loss's scale does not outlive it.
    """
    with ExitStack() as stack:
        before = MoEAuxLossAutoScaler.main_loss_backward_scale
        stack.callback(setattr, MoEAuxLossAutoScaler, "main_loss_backward_scale", before)
        for module in model.modules():
            if hasattr(module, "local_experts"):
                stack.callback(module.register_forward_pre_hook(_hand_even).remove)
        yield


def _hand_even(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    tokens, _, *others = args
    return tokens, _Even(tokens.shape[0], module.num_local_experts), *others
