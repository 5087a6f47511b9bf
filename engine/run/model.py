"""The model a run trains: a Hugging Face folder, a preset, or an inline configuration."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..config.run_blocks import ModelBlock
from ..errors import UserError, did_you_mean


def preset_names() -> list[str]:
    return sorted(path.name.removesuffix(".json") for path in _presets().iterdir() if path.name.endswith(".json"))


def _presets() -> Any:
    return resources.files("narrowgauge.configs") / "models"


def model_config(block: ModelBlock, *, vocab_size: int | None, sequence_length: int) -> PretrainedConfig:
    """The Hugging Face configuration of the model.

    Args:
        vocab_size: of the tokenizer; taken for the model where its configuration names none.

    Raises:
        UserError: no such folder, preset, model type or key, or a vocabulary or context too small for the data.
    """
    config = _from_folder(Path(block.path).expanduser()) if block.path is not None else _from_scratch(block, vocab_size)
    if vocab_size is not None and config.vocab_size < vocab_size:
        raise UserError(
            f"model: expected a vocab_size of at least the tokenizer's {vocab_size}, got {config.vocab_size}"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < sequence_length:
        raise UserError(f"data.sequence_length: expected at most the model's {context} tokens, got {sequence_length}")
    return config


def _from_folder(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model.path: {folder} holds no Hugging Face model: {error}") from error
    if not any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        raise UserError(f"model.path: {folder} holds no weights (*.safetensors or pytorch_model*.bin)")
    return config


def _from_scratch(block: ModelBlock, vocab_size: int | None) -> PretrainedConfig:
    settings: dict[str, Any] = {}
    if block.preset is not None:
        if block.preset not in preset_names():
            hint = did_you_mean(block.preset, preset_names())
            raise UserError(f"model.preset: expected one of {preset_names()}, got {block.preset!r}{hint}")
        settings = json.loads(_presets().joinpath(f"{block.preset}.json").read_text())
    settings |= block.config
    if vocab_size is not None:
        settings.setdefault("vocab_size", vocab_size)
    model_type = settings.pop("model_type", None)
    try:
        known = AutoConfig.for_model(model_type)
    except (ValueError, KeyError) as error:
        raise UserError(f"model.config.model_type: {model_type!r} is not a model type of transformers") from error
    allowed = {*known.to_dict(), *known.attribute_map, "architectures", "attn_implementation"}
    for key in settings:
        if key not in allowed:
            raise UserError(f"model.config.{key}: unknown key for {model_type}{did_you_mean(key, allowed)}")
    try:
        return AutoConfig.for_model(model_type, **settings)
    except Exception as error:
        # Model types raise what comes: a strict dataclass's error, a KeyError for an unknown activation.
        raise UserError(f"model.config: {type(error).__name__}: {error}") from error


def abstract_model(config: PretrainedConfig) -> nn.Module:
    """The model without storage, to check options and count parameters before anything is allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
