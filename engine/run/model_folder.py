"""A Hugging Face folder that a run starts from, checked before anything is built. No code in it is run."""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..checkpoint.files import checksum
from ..errors import UserError, one_line
from ..files import local_path

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ADAPTER = "adapter_config.json"
# What transformers looks for, in its order: one file, or an index of several.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def config_of_folder(path: str) -> PretrainedConfig:
    """The configuration of the causal language model in a folder whose weights can be read.

    Raises:
        UserError: there is no such folder, or what it holds cannot be trained.
    """
    folder = local_path(path, "model.path")
    if not folder.is_dir():
        raise UserError(f"model.path: expected a Hugging Face folder on this machine, got {path!r}{_hint(path)}")
    if (folder / _ADAPTER).exists():
        raise UserError(
            f"model.path: {folder} holds an adapter ({_ADAPTER}), which transformers would put into the model, or take"
            " its model for this one: expected a model alone; merge the adapter into it (narrowgauge export --merge, or"
            " peft's merge_and_unload), or move the adapter away"
        )
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Configurations check themselves, and raise what comes.
        raise UserError(
            f"model.path: {folder} holds no Hugging Face model that can be used: {one_line(error)}"
        ) from error
    text = text_config_of(config, "model.path")
    if text is not config:
        raise UserError(
            f"model.path: {folder} holds a {config.model_type}, which is made of several models; save its text model"
            f" ({text.model_type}) in a folder of its own"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"model.path: {folder} holds a {config.model_type}, which is no causal language model")
    if quantized := getattr(config, "quantization_config", None):
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise UserError(
            f"model.path: {folder} holds quantized weights (quantization_config, {kind}): expected plain ones; load"
            " them with transformers, dequantize() and save_pretrained(). lora.base nf4 quantizes plain weights itself"
        )
    for file in weight_files(folder):
        _check_weights(file)
    return config


def text_config_of(config: PretrainedConfig, where: str) -> PretrainedConfig:
    """The configuration of the text model inside a composite; of any other model its own.

    Raises:
        UserError: there are several text models inside.
    """
    try:
        return config.get_text_config()
    except ValueError as error:
        raise none_alone(config, where) from error


def none_alone(config: PretrainedConfig, where: str) -> UserError:
    """For a composite without a text model that transformers builds by itself."""
    return UserError(
        f"{where}: {config.model_type} is made of several models, none of which is a causal language model alone"
    )


def _hint(path: str) -> str:
    if not _HUB_NAME.fullmatch(path):
        return ""
    return f"; nothing is downloaded: fetch a model from the hub first (hf download {path} --local-dir FOLDER)"


def record_of_folder(path: str) -> dict[str, Any]:
    """What tells a model's folder from another: where it is, and the size and checksum of its files of weights."""
    folder = local_path(path, "model.path").resolve()
    return {"path": str(folder), "files": {file.name: checksum(file) for file in weight_files(folder)}}


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Check that the folder of :func:`record_of_folder` still holds what it held.

    Raises:
        UserError: it is gone, or has other weights.
    """
    folder = Path(record["path"])
    for name, expected in record["files"].items():
        if not (folder / name).is_file() or checksum(folder / name) != expected:
            found = "other contents" if (folder / name).is_file() else "nothing"
            raise UserError(
                f"{where}: its adapters belong to the weights of {folder / name}, where there is now {found}"
            )


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a Hugging Face folder.

    Raises:
        UserError: there are none, or an index names one that is not there.
    """
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"model.path: {folder} holds no weights (model.safetensors or pytorch_model.bin, or an index)")
    if found.suffix != ".json":
        return [found]
    try:
        files = sorted({folder / name for name in json.loads(found.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.path: {found}: expected an index of weights: {error}") from error
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"model.path: {folder} lacks {len(missing)} of its {len(files)} files, such as {missing[0]}")
    return files


def _check_weights(path: Path) -> None:
    """Open a file of weights as it is read later, without reading the tensors."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return
        torch.load(path, map_location="meta", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.path: {path}: expected tensors, got a pickle with other objects, which is not read: it could run"
            " code; save the weights as safetensors"
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"model.path: {path}: damaged, or no file of weights: {one_line(error)}") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
