"""Building the model that an engine trains; what differs between engines is handed in."""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from narrowgauge.optimizers.numerics.seeds import derive_seed

from ..config.config import Config
from ..config.run_blocks import ModelBlock
from .first_weights import Whole, draw_weights, undrawn


def build_model(
    block: ModelBlock,
    model_config: PretrainedConfig,
    config: Config,
    *,
    whole: Whole = lambda parameters: nullcontext(),
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
        seed = config.parsed.training.seed if config.parsed.training is not None else 0
        # For what no rule draws: its constructor did.
        torch.manual_seed(derive_seed(seed, "weights"))
        with undrawn():
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
        draw_weights(model, seed, whole)
    model.config.use_cache = False
    if block.gradient_checkpointing != "none":
        reentrant = block.gradient_checkpointing == "reentrant"
        # Renamed in transformers 5; the old name warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
    model.train()
    return model
