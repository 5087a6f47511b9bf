"""Building the model that an engine trains; what differs between engines is handed in."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from narrowgauge.optimizers.numerics.seeds import derive_seed

from ..config.config import Config
from ..config.run_blocks import ModelBlock


def build_model(
    block: ModelBlock,
    model_config: PretrainedConfig,
    config: Config,
    *,
    whole: Callable[[Sequence[Tensor]], AbstractContextManager[Any]] = lambda parameters: nullcontext(),
) -> nn.Module:
    """Build the model, in bf16 if the configuration says so.

    From-scratch weights depend on the seed and the parameter's name only: every engine and number of ranks starts
    alike (on one kind of device).

    Args:
        whole: within it parameters are whole, and what is written to them stays; for parameters that are sharded.
    """
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    if block.path is not None:
        path = str(Path(block.path).expanduser())
        model = AutoModelForCausalLM.from_pretrained(path, config=model_config, dtype=dtype, local_files_only=True)
    else:
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        _initialize(model, config.parsed.training.seed if config.parsed.training is not None else 0, whole)
    model.config.use_cache = False
    if block.gradient_checkpointing != "none":
        reentrant = block.gradient_checkpointing == "reentrant"
        # Renamed in transformers 5; the old name warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
    model.train()
    return model


@torch.no_grad()
def _initialize(model: Any, seed: int, whole: Callable[[Sequence[Tensor]], AbstractContextManager[Any]]) -> None:
    """Draw each module's weights from a seed of its own, by the model's own rule for it."""
    for name, module in model.named_modules():
        with whole(list(module.parameters(recurse=False))):
            torch.manual_seed(derive_seed(seed, "weights", name))
            model._init_weights(module)
