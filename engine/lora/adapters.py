"""LoRA adapters in the model that an engine trains, by ``peft``."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from narrowgauge.optimizers.layers.compact import compact_units
from narrowgauge.optimizers.numerics.seeds import derive_seed

from ..config.config import Config
from ..config.lora_block import LoraBlock
from ..errors import UserError, one_line

NAME = "default"


def check_lora(config: Config) -> None:
    """Refuse what adapters cannot go with, before anything is built.

    Raises:
        ConfigError: naming each setting and what to use instead.
    """
    block, parsed = config.parsed.lora, config.parsed
    if block is None:
        return
    problems = []
    if parsed.model is not None and parsed.model.path is None:
        problems.append("lora: expected model.path, a trained model to adapt, got a model from random weights")
    if parsed.engine == "megatron":
        problems.append("lora: expected engine 'deepspeed' or 'ddp', got 'megatron'")
    if block.base == "nf4" and config.zero_stage == 3:
        problems.append("lora.base: expected 'full' at ZeRO-3, which cuts the frozen weights, got 'nf4'")
    needed = {"peft": True, "bitsandbytes": block.base == "nf4"}
    for package, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(package) is None:
            problems.append(
                f"lora: expected the package {package}, which is not installed: pip install narrowgauge[lora]"
            )
    if problems:
        raise config.error(*problems)


def quantization_of(block: LoraBlock | None, dtype: torch.dtype) -> Any:
    """What transformers is to hold the frozen weights in; None as they are."""
    if block is None or block.base == "full":
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def peft_config(block: LoraBlock, base: str | None) -> Any:
    """``peft``'s own description of the adapters.

    Args:
        base: the folder of the model that they belong to.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=block.rank,
        lora_alpha=block.alpha,  # pyright: ignore[reportArgumentType] (a float scales as well)
        lora_dropout=block.dropout,
        target_modules=block.target_modules,
        modules_to_save=block.modules_to_save or None,
        use_rslora=block.rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def add_adapters(model: nn.Module, block: LoraBlock, *, seed: int | None) -> None:
    """Freeze the model and put adapters into it; the model stays of its class, its layers get peft's.

    Args:
        seed: A is drawn from it and the layer's name, the same in every engine and on any number of ranks; None for a
            model without storage.

    Raises:
        UserError: a name matches no layer, or one that peft cannot adapt.
    """
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(peft_config(block, None), model, adapter_name=NAME)
    except (ValueError, TypeError) as error:
        raise UserError(f"lora: {one_line(error)}") from error
    unmatched = [name for name in _named(block) if not any(_ends(path, name) for path, _ in _adapted(model))]
    if unmatched:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise UserError(f"lora: {unmatched[0]!r} names no layer of the model; it has {', '.join(linears[:8])}, ...")
    if seed is None:
        return
    for path, layer in _adapted(model):
        if NAME in getattr(layer, "lora_A", {}) or NAME in getattr(layer, "lora_embedding_A", {}):
            torch.manual_seed(derive_seed(seed, "lora", path))
            layer.reset_lora_parameters(NAME, init_lora_weights=True)


def frozen_base(model: nn.Module) -> set[str]:
    """The names of a model's parameters and buffers that are its base's below adapters: it has them from elsewhere, as
    they are. Empty without adapters.
    """
    if not is_adapted(model):
        return set()
    kept = {id(unit.weight) for unit in compact_units(model)}
    own = [name for name, p in model.named_parameters() if p.requires_grad or id(p) in kept]
    return {*model.state_dict(keep_vars=True)} - {*own}


def is_adapted(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None


def _named(block: LoraBlock) -> list[str]:
    targets = block.target_modules if isinstance(block.target_modules, list) else []
    return [*targets, *block.modules_to_save]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers: those with factors, and copies of modules that are trained whole."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer | ModulesToSaveWrapper):
            yield path, module
