"""Floating point operations that a model needs, and those that a device can do: model FLOPs utilization (MFU).

Chowdhery et al., PaLM, 2022, appendix B: what the model needs for the tokens of a step, whatever is computed beyond it
(recomputation is not counted), over what the devices could have done in the step's time.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

# Dense bf16 FLOP/s of data sheets, without sparsity, summed in fp32. The first name that is part of the device's holds.
_KNOWN = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800 PCIe": 756e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
}
# Parts and variants of a GPU, which do less, or more.
_OTHERS = ("MIG", "Laptop", "Max Q", "Ti", "D")
_SIZE, _SECONDS, _LEAST_ATTEMPTS = 512, 0.05, 10


@dataclass(frozen=True)
class Peak:
    """What a device can do.

    Attributes:
        flops: per second.
        source: where the figure is from, for people.
    """

    flops: float
    source: str


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """The data sheet's figure of a known GPU in bf16; else what a multiplication of matrices reaches here and now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = known_peak(name) if dtype == torch.bfloat16 else None
    if found is not None:
        return Peak(found, f"{name}, {found / 1e12:,.0f} TFLOP/s in bf16 by its data sheet")
    flops = _measured(device, dtype)
    unknown = f", a GPU without a known figure in {str(dtype).removeprefix('torch.')}" if device.type == "cuda" else ""
    return Peak(flops, f"{name}{unknown}, {flops / 1e12:.3g} TFLOP/s measured with {_SIZE} x {_SIZE} matrices")


def known_peak(name: str) -> float | None:
    """FLOP/s in bf16 of a GPU by its name, as CUDA gives it."""
    words = f" {name} ".replace("-", " ").replace("_", " ")
    if any(f" {other} " in words for other in _OTHERS):
        return None
    return next((flops for known, flops in _KNOWN.items() if f" {known} " in words), None)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    size = _SIZE if device.type == "cpu" else 8 * _SIZE
    matrix, best = torch.ones(size, size, dtype=dtype, device=device), float("inf")
    until = time.perf_counter() + _SECONDS
    # On a busy machine a single product may take several times as long as it needs.
    for attempt in range(1000):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        # The first one loads the library.
        best = min(best, now - began) if attempt else best
        if attempt >= _LEAST_ATTEMPTS and now > until:
            break
    return 2 * size**3 / best


def flops_per_token(
    model: nn.Module, config: PretrainedConfig, counts: Mapping[str, int], sequence_length: int
) -> float | None:
    """What forward and backward need for a token: 2 for each weight of a matrix in forward, 2 in backward for the
    layer's input, 2 for each element that is trained; and ``12 L H S`` of attention, whose mask is not counted.

    Args:
        model: without storage, as transformers builds it.
        counts: of :func:`.parameters.count_parameters`; what is compact has fewer elements to be trained.

    Returns:
        None where the model does not say how many of its experts a token goes through.
    """
    lookup: set[int] = set()
    built: Any = model
    head = built.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            lookup |= {id(module.weight)} - tied
    used, whole, embedded = 0.0, 0, 0
    for name, parameter in model.named_parameters():
        if id(parameter) in lookup:
            embedded += parameter.numel()
            continue
        share = 1.0
        if ".experts." in f".{name}." and "shared" not in name:
            chosen, experts = getattr(config, "num_experts_per_tok", None), _num_experts(config)
            if not isinstance(chosen, int) or experts is None:
                return None
            share = chosen / experts
        if parameter.dim() > 1:
            used += share * parameter.numel()
            whole += parameter.numel()
    trained = counts["compact"] + counts["dense"] - (embedded if counts["dense"] >= embedded else 0)
    layers, heads = (getattr(config, key, None) or 0 for key in ("num_hidden_layers", "num_attention_heads"))
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
    return (4 + 2 * min(1.0, trained / whole)) * used + 12 * layers * width * sequence_length


def _num_experts(config: PretrainedConfig) -> int | None:
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), None)
