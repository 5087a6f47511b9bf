"""Building the model that an engine trains; what differs between engines is handed in."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from narrowgauge.optimizers.numerics.seeds import derive_seed

from ..config.config import Config
from ..config.run_blocks import ModelBlock
from ..errors import UserError, one_line
from ..files import local_path
from ..lora.adapters import add_adapters, quantization_of
from ..quantization.quantize import quantize
from ..sampled_backward import sample_backward
from .first_weights import Whole, draw_weights, from_one_stream, take_weights, undrawn


def build_model(
    block: ModelBlock,
    model_config: PretrainedConfig,
    config: Config,
    *,
    sharded: AbstractContextManager[Any] | None = None,
    whole: Whole = lambda parameters: nullcontext(),
) -> nn.Module:
    """Build the model, in bf16 if the configuration says so.

    From-scratch weights depend on the seed and the parameter's name only: every engine and number of ranks starts
    alike (on one kind of device). Where the configuration asks for transformers' own stream of numbers, on the
    architecture and the seed.

    Args:
        sharded: within it parameters are sharded as they are made.
        whole: within it parameters are whole, and what is written to them stays; for parameters that are sharded.
    """
    seed = config.parsed.training.seed if config.parsed.training is not None else 0
    values = from_one_stream(model_config, seed) if block.initial_weights == "transformers" else None
    with sharded or nullcontext():
        return _build(block, model_config, config, seed, values, whole)


def _build(
    block: ModelBlock,
    model_config: PretrainedConfig,
    config: Config,
    seed: int,
    values: Mapping[str, Tensor] | None,
    whole: Whole,
) -> nn.Module:
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    lora = config.parsed.lora
    if block.path is not None:
        model = from_folder(block.path, model_config, dtype, quantization_of(lora, dtype))
    else:
        # For what no rule draws: its constructor did.
        torch.manual_seed(derive_seed(seed, "weights"))
        with undrawn():
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
        if values is None:
            draw_weights(model, seed, whole)
        else:
            take_weights(model, values, seed, whole)
    if lora is not None:
        add_adapters(model, lora, seed=seed)
    if config.parsed.quantization is not None:
        quantize(model, config.parsed.quantization)
    if config.parsed.sampled_backward is not None:
        sample_backward(model, config.parsed.sampled_backward, lora=lora is not None)
    model.config.use_cache = False
    if block.gradient_checkpointing != "none":
        reentrant = block.gradient_checkpointing == "reentrant"
        # Renamed in transformers 5; the old name warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        if lora is not None and reentrant:
            # The reentrant form has no backward where no input of a block needs a gradient.
            model.enable_input_require_grads()
    model.train()
    return model


def from_folder(path: str, model_config: PretrainedConfig, dtype: torch.dtype, quantization: Any = None) -> Any:
    """A model with its weights from a folder.

    Args:
        quantization: transformers' configuration of it; None for the weights as they are.

    Raises:
        UserError: they cannot be read, or are not all the model has: transformers would draw the others.
    """
    folder = str(local_path(path, "model.path"))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=model_config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    except (torch.OutOfMemoryError, MemoryError, torch.distributed.DistError):
        raise
    except Exception as error:
        raise UserError(f"model.path: {folder}: {type(error).__name__}: {one_line(error)}") from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"model.path: {folder} holds no weights for {len(missing)} parameters of {type(model).__name__}, such as"
            f" {missing[0]}"
        ).shared()
    return model
