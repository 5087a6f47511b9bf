"""Adapters of a checkpoint in ``peft``'s form, or merged into the model that they belong to."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..checkpoint.contents import write_tensors
from ..checkpoint.files import Checkpoint
from ..config.lora_block import LoraBlock
from ..errors import UserError
from ..lora.adapters import NAME, add_adapters


def write_adapter(checkpoint: Checkpoint, block: LoraBlock, model: nn.Module, base: str, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which ``PeftModel.from_pretrained`` reads.

    Args:
        model: the base, without storage; gets adapters.
        base: its folder, which the configuration names.
    """
    from peft import get_peft_model_state_dict

    add_adapters(model, block, seed=None)
    tensors = {}
    for path in checkpoint.tensors("model"):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    state = get_peft_model_state_dict(model, state_dict=tensors, adapter_name=NAME, save_embedding_layers=False)
    kept = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
    write_tensors(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    described: Any = model
    config = described.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))


def _check_merge(model: Any, adapter: Path, base: str) -> None:
    """Refuse an adapter of one of two layers that share a weight: merged, it would be the other's too.

    Raises:
        UserError: naming the layer.
    """
    ends = {id(module): module for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    if len({id(module.weight) for module in ends.values()}) == len(ends):
        return
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        keys = list(file.keys())
    for name, module in model.named_modules():
        if id(module) in ends and any(key.startswith(f"base_model.model.{name}.lora_") for key in keys):
            raise UserError(
                f"{base}: embedding and head share a weight, and the adapter is for {name} alone: expected an export"
                " without --merge"
            )


def write_merged(adapter: Path, base: str, folder: Path) -> None:
    """Write the base with the adapter's products added to its weights, as a Hugging Face folder in the base's dtype."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", local_files_only=True, trust_remote_code=False
    )
    _check_merge(model, adapter, base)
    with torch.no_grad():
        merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(folder))
    # It names a folder of this machine, of no use elsewhere.
    path = folder / "config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "_name_or_path"}, indent=2)
    )
    # safetensors makes files that nobody but their owner can read.
    for weights in folder.glob("*.safetensors"):
        weights.chmod(path.stat().st_mode)
