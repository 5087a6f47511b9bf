"""transformers' ``generate`` over a model that is cut over process ranks."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import StagedModel
from .schedule import next_token_logits


def generate(model: StagedModel, tokens: Tensor, *, before_forward: Callable[[], None], **options: Any) -> Tensor:
    """Continue ``(batch, sequence)`` as transformers does, without a cache of keys and values. Collective: all process
    ranks generate the same, where their random states are the same.

    Args:
        before_forward: called before each forward.
        options: of ``GenerationMixin.generate``.
    """
    whole: Any = _Whole(model)
    whole.register_forward_pre_hook(lambda *_: before_forward())
    return whole.generate(tokens, **{**options, "use_cache": False})


class _Whole(PreTrainedModel, GenerationMixin):
    """What ``generate`` sees of the model: its configuration, and the next token's logits."""

    # It has no attention of its own; transformers asks.
    _supports_sdpa = True

    def __init__(self, model: StagedModel) -> None:
        config = copy.deepcopy(model.config)  # transformers writes to it
        # It has no experts of its own either, and transformers refuses another word.
        config._experts_implementation = "eager"
        super().__init__(config)
        self._staged = [model]

    @property
    def device(self) -> torch.device:
        return next(self._staged[0].parameters()).device

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, **unused: Any) -> CausalLMOutput:
        logits: Any = next_token_logits(self._staged[0], input_ids)[:, None]
        return CausalLMOutput(logits=logits)
