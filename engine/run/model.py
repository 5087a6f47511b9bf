"""The model a run trains: a Hugging Face folder, a preset, or an inline configuration."""

import copy
import json
import logging
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..config.run_blocks import ModelBlock
from ..errors import UserError, did_you_mean, one_line
from ..ranks.environment import process_rank
from .model_folder import config_of_folder, none_alone, text_config_of
from .model_keys import ROPE_KEYS, keys_of
from .released_keys import is_left_out
from .said import said_of

logger = logging.getLogger(__name__)


def preset_names() -> list[str]:
    return sorted(path.name.removesuffix(".json") for path in _presets().iterdir() if path.name.endswith(".json"))


def _presets() -> Any:
    return resources.files("narrowgauge.configs") / "models"


def model_config(block: ModelBlock, *, vocab_size: int | None, sequence_length: int) -> PretrainedConfig:
    """The Hugging Face configuration of the model.

    Args:
        vocab_size: of the tokenizer; taken for the model where its configuration names none.

    Raises:
        UserError: no such folder, preset, model type or key, a model that is no causal language model, or a vocabulary
            or context too small for the data.
    """
    config = config_of_folder(block.path) if block.path is not None else _from_scratch(block, vocab_size)
    if vocab_size is not None and config.vocab_size < vocab_size:
        raise UserError(
            f"model: expected a vocab_size of at least the tokenizer's {vocab_size}, got {config.vocab_size}"
        )
    context = getattr(config, "max_position_embeddings", None)
    # XLNet says -1 for no limit.
    if context is not None and 0 < context < sequence_length:
        raise UserError(f"data.sequence_length: expected at most the model's {context} tokens, got {sequence_length}")
    return config


def check_model(block: ModelBlock) -> None:
    """Find what is wrong with the model without knowing the data, before that is prepared.

    Raises:
        UserError: as :func:`model_config`, or the model cannot be built.
    """
    config = config_of_folder(block.path) if block.path is not None else _from_scratch(block, None)
    abstract_model(config)


def _from_scratch(block: ModelBlock, vocab_size: int | None) -> PretrainedConfig:
    settings: dict[str, Any] = {}
    if block.preset is not None:
        if block.preset not in preset_names():
            hint = did_you_mean(block.preset, preset_names())
            raise UserError(f"model.preset: expected one of {preset_names()}, got {block.preset!r}{hint}")
        settings = json.loads(_presets().joinpath(f"{block.preset}.json").read_text())
    # transformers changes the objects that it is given.
    settings |= copy.deepcopy(block.config)
    model_type = settings.pop("model_type", None)
    known = _known(model_type, "model.config")
    text = text_config_of(known, "model.config")
    if text is known:
        return _make(known, settings, vocab_size, "model.config")
    return _text_model(known, text, settings, vocab_size)


def _text_model(
    known: PretrainedConfig, text: PretrainedConfig, settings: dict[str, Any], vocab_size: int | None
) -> PretrainedConfig:
    """The configuration of the text model inside one that is made of several."""
    key = next((key for key in known.sub_configs if getattr(known, key, None) is text), "text_config")
    found = settings.pop(key, None)
    if not isinstance(found, dict):
        if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise none_alone(known, "model.config")
        raise UserError(
            f"model.config: {known.model_type} is made of several models, of which only the text model is trained:"
            f" expected its keys in an object {key!r}, got none; or give them with the model_type {text.model_type!r}"
        )
    _check_keys(settings, type(known), "model.config")
    text = _known(found.pop("model_type", text.model_type), f"model.config.{key}")
    return _make(text, found, vocab_size, f"model.config.{key}")


def _known(model_type: Any, where: str) -> PretrainedConfig:
    try:
        return AutoConfig.for_model(model_type)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}.model_type: {model_type!r} is not a model type of transformers") from error
    except Exception as error:
        # Of types whose own defaults do not hold, or need another package.
        raise UserError(said_of(error, f"{where}: {model_type}")) from error


def _make(known: PretrainedConfig, settings: dict[str, Any], vocab_size: int | None, where: str) -> PretrainedConfig:
    if vocab_size is not None:
        settings.setdefault("vocab_size", vocab_size)
    _check_keys(settings, type(known), where)
    try:
        config = AutoConfig.for_model(known.model_type, **settings)
    except Exception as error:
        # Model types raise what comes: a strict dataclass's error, a KeyError for an unknown activation.
        raise UserError(said_of(error, where)) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{where}.model_type: {known.model_type!r} is not a causal language model of transformers")
    return config


def _check_keys(settings: dict[str, Any], kind: type[PretrainedConfig], where: str) -> None:
    """Take out what released files have and nothing reads; say so once.

    Raises:
        UserError: other keys that transformers does not read.
    """
    allowed = keys_of(kind)
    unknown = [key for key in settings if key not in allowed]
    left_out = [key for key in unknown if is_left_out(key, settings, kind.model_type)]
    wrong = [key for key in unknown if key not in left_out]
    if wrong:
        more = f" (and {', '.join(wrong[1:])})" if wrong[1:] else ""
        raise UserError(f"{where}.{wrong[0]}: unknown key for {kind.model_type}{did_you_mean(wrong[0], allowed)}{more}")
    for key in left_out:
        del settings[key]
    if left_out:
        _tell_left_out(kind.model_type, where, tuple(left_out))
    for key in ("rope_parameters", "rope_scaling"):
        _check_rope(settings.get(key), f"{where}.{key}")


@cache
def _tell_left_out(model_type: str, where: str, keys: tuple[str, ...]) -> None:
    if process_rank() == 0:
        logger.warning(f"{where}: left out, transformers does not read them for {model_type}: {', '.join(keys)}")


def _check_rope(found: Any, where: str) -> None:
    """transformers takes any key here, and names in a log what it does not use."""
    for key, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, dict):
            # Of one type of layers.
            _check_rope(value, f"{where}.{key}")
        elif key not in ROPE_KEYS and (hint := did_you_mean(key, ROPE_KEYS)):
            raise UserError(f"{where}.{key}: unknown key{hint}")


def abstract_model(config: PretrainedConfig) -> nn.Module:
    """The model without storage, to check options and count parameters before anything is allocated.

    Raises:
        UserError: it is out of bounds, transformers cannot build it, or it would see the tokens that it has to predict.
    """
    _check_bounds(config)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"model: transformers cannot build this {config.model_type}: {type(error).__name__}: {one_line(error)}"
        ) from error
    if config.model_type in _NOT_SHIFTED:
        raise UserError(
            f"model: transformers trains a {config.model_type} to repeat the token that it is given, not to predict the"
            " next one: expected another model type"
        )
    if config.model_type in _OF_IMAGES:
        raise UserError(
            f"model: transformers trains a {config.model_type} on images with their captions: expected another model"
            " type"
        )
    _check_sizes(config)
    for key, (bidirectional, causal) in _DIRECTIONS.items():
        found = getattr(model.config, key, causal)
        if found in bidirectional and (key, config.model_type) not in _CAUSAL_ANYWAY:
            raise UserError(
                f"model.config.{key}: expected {json.dumps(causal)}, got {json.dumps(found)}:"
                f" {config.model_type} would see the tokens that it has to predict"
            )
    return model


# Some ten times the largest models'. What is built for a layer, and indices of a column, are real without storage, too.
_MOST = {"num_hidden_layers": 2_000, "hidden_size": 1 << 20, "intermediate_size": 1 << 20}


def _check_bounds(config: PretrainedConfig) -> None:
    for key, most in _MOST.items():
        if isinstance(found := getattr(config, key, None), int) and found > most:
            raise UserError(f"model.config.{key}: expected at most {most}, got {found}")


def _check_sizes(config: PretrainedConfig) -> None:
    """What transformers builds, and the first forward ends at, or has nothing to train in."""
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size"):
        if isinstance(found := getattr(config, key, None), int) and found < 1:
            raise UserError(f"model.config.{key}: expected at least 1, got {found}")
    for part, whole in (("num_key_value_heads", "num_attention_heads"), ("n_group", "n_routed_experts")):
        parts, wholes = _number(config, part), _number(config, whole)
        if parts and wholes and wholes % parts:
            raise UserError(f"model.config.{part}: expected a divisor of {whole}, {wholes}, got {parts}")
    chosen = _number(config, "num_experts_per_tok")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        experts = _number(config, key)
        if chosen and experts and chosen > experts:
            raise UserError(f"model.config.num_experts_per_tok: expected at most {key}, {experts}, got {chosen}")


def _number(config: PretrainedConfig, key: str) -> int | None:
    found = getattr(config, key, None)
    return found if isinstance(found, int) and found > 0 else None


# Whose loss compares each token's output with that token: decoders for translation, whose labels come shifted.
_NOT_SHIFTED = {
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "cpmant",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
    "prophetnet",
    "trocr",
    "whisper",
    "xlm",
    "xlnet",
}
# Whose loss counts on an image before the text.
_OF_IMAGES = {"git"}
# What models have that are trained on masked tokens too, as BERT is: its values then, and for causal language models.
_DIRECTIONS = {
    "is_decoder": ((False,), True),
    "use_bidirectional_attention": ((True, "all"), None),
    "is_causal": ((False,), True),
}
# That have the key and do not ask it.
_CAUSAL_ANYWAY = {("is_decoder", "gpt_neox"), ("is_decoder", "gpt_neox_japanese")}
