"""``data_types.keep_in_fp32_modules``, which DeepSpeed follows for buffers alone."""

import warnings
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.keep_in_fp32 import keep_in_fp32_pattern

from ...config.config import Config
from ...ranks.environment import process_rank
from .keys import deepspeed_keys


def warn_of_fp32(config: Config, engine: DeepSpeedEngine) -> None:
    """Say which of the names that are given have no effect: those of parameters, of nothing, or of a run in fp32."""
    blocks = deepspeed_keys(config).data_types
    names = blocks.keep_in_fp32_modules if blocks is not None else None
    if not isinstance(names, list) or process_rank() > 0:
        return
    key = "data_types.keep_in_fp32_modules"
    own: Any = engine
    if not (own.fp16_enabled() or own.bfloat16_enabled()):
        if names:
            warnings.warn(f"{key}: not used: without fp16 or bf16 everything is in fp32", stacklevel=3)
        return
    for name in names:
        pattern: Any = keep_in_fp32_pattern(own.module, [name], torch.bfloat16)
        if parameters := [found for found, _ in own.module.named_parameters() if pattern.search(found)]:
            warnings.warn(
                f"{key}: {name!r} is followed for buffers only: DeepSpeed trains parameters in the model's precision,"
                f" {parameters[0]} among them ({len(parameters)})",
                stacklevel=3,
            )
        elif not any(pattern.search(found) for found, _ in own.module.named_buffers()):
            warnings.warn(f"{key}: {name!r} matches no buffer of the model", stacklevel=3)
