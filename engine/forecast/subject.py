"""What is trained: the model without storage, as its optimizer has made it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from narrowgauge.optimizers import CompactOptimizer, EngineOptimizer, ShardedOptimizer
from narrowgauge.optimizers.compact.muon import Muon
from narrowgauge.optimizers.compact.options import CompactOptions
from narrowgauge.optimizers.options import Options

from ..config.config import Config
from ..config.optimizer_params import make_optimizer
from ..lora.adapters import add_adapters
from ..report.parameters import count_parameters
from ..run.model import abstract_model
from ..sampled_backward import sample_trial

FP32 = 4
# Of bitsandbytes' moments: elements that share a scale, and of the smallest tensor that has them.
_BLOCK, _SMALLEST = 256, 4096


@dataclass(frozen=True)
class Subject:
    """A model on the meta device, and what trains it.

    Attributes:
        optimizer: one of ours; None for torch's and DeepSpeed's.
        element: bytes of a weight.
        counts: of :func:`~narrowgauge.engine.report.parameters.count_parameters`.
        groups: elements of each trained parameter, by group of the optimizer.
        numels: elements of each parameter, compact ones too.
    """

    model: Any
    optimizer: EngineOptimizer[Any] | None
    element: int
    counts: dict[str, int]
    groups: Sequence[Sequence[int]]
    numels: Sequence[int]

    @property
    def trained(self) -> int:
        """Elements."""
        return sum(map(sum, self.groups))

    @property
    def largest(self) -> int:
        """Elements of the largest trained parameter."""
        return max((numel for group in self.groups for numel in group), default=0)

    @property
    def weights(self) -> int:
        """Bytes of all weights, the compact ones apart."""
        return self.element * (self.counts["dense"] + self.counts["frozen"])

    @property
    def compact(self) -> int:
        """Bytes of the compact weights."""
        return self.element * self.counts["compact"]

    @property
    def subspaces(self) -> int:
        """Bytes of indices and bases, whole on each process rank."""
        return self.optimizer.subspace_bytes() if self.optimizer is not None else 0

    @property
    def muon(self) -> Muon | None:
        """Where it is what steps the matrices."""
        base = self.optimizer.base if isinstance(self.optimizer, CompactOptimizer) else None
        return base if isinstance(base, Muon) else None

    def moments(self, stepped: int) -> int:
        """Bytes of the optimizer's moments, over all process ranks that share them.

        Args:
            stepped: bytes of an element of what is stepped.
        """
        if isinstance(self.optimizer, ShardedOptimizer):
            return sharded_moments(self.optimizer)
        if self.muon is not None:
            dense = (g["params"] for g in self.muon.param_groups if g["kind"] == "dense")
            return 2 * stepped * sum(p.numel() for group in dense for p in group) + self.muon.bytes_of_state(stepped)
        base = getattr(self.optimizer.options, "base", "AdamW") if self.optimizer is not None else "AdamW"
        elements = [numel for group in self.groups for numel in group]
        if base == "AdamW8bit":
            return sum(2 * (n + FP32 * n // _BLOCK) if n >= _SMALLEST else 2 * FP32 * n for n in elements)
        return 2 * stepped * sum(elements)


def sharded_moments(optimizer: ShardedOptimizer[Any]) -> int:
    """Bytes of the moments of an optimizer on full gradients, fp32: those that it would make."""
    total = 0
    for group in optimizer.param_groups:
        for flat in group["params"]:
            pieces = list(optimizer.state_pieces(flat))
            state = optimizer.state.get(flat, {})
            made = [value for value in state.values() if torch.is_tensor(value)]
            if pieces or made:
                total += sum(value.numel() * value.element_size() for value in made)
            else:
                total += FP32 * flat.numel() * (1 if optimizer.type_name == "Lars" else 2)
    return total


def subject_of(config: Config, model_config: PretrainedConfig) -> Subject:
    """The configuration's model, converted.

    Raises:
        ConfigError: the options of the optimizer or of sampling do not fit it, or its weights are quantized.
    """
    parsed = config.parsed
    if parsed.lora is not None and parsed.lora.base != "full":
        raise config.error(f"lora.base: expected full, got {parsed.lora.base}: what 4 bits take is not told ahead")
    assert parsed.optimizer is not None
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    described = copy.deepcopy(model_config)
    described.dtype = dtype
    model: Any = abstract_model(described)
    model.to(dtype)
    if parsed.lora is not None:
        add_adapters(model, parsed.lora, seed=None)
    sample_trial(config, model)
    model.config.use_cache = False
    optimizer = None
    if config.optimizer_options is not None:
        with config.blames("optimizer.params"):
            optimizer = make_optimizer(parsed.optimizer.type, model, on_meta(config.optimizer_options))
    return Subject(
        model,
        optimizer,
        dtype.itemsize,
        count_parameters(model),
        groups_of(model, optimizer),
        [p.numel() for p in model.parameters()],
    )


def groups_of(model: nn.Module, optimizer: EngineOptimizer[Any] | None) -> list[list[int]]:
    """Elements of each trained parameter, by group of the optimizer."""
    if optimizer is None:
        return [[p.numel() for p in model.parameters() if p.requires_grad]]
    return [[p.numel() for p in group["params"]] for group in optimizer.param_groups]


def on_meta(options: Options) -> Options:
    """The same options, for tensors without storage: whether a device takes ``fused`` is not theirs to say."""
    return replace(options, fused=None) if isinstance(options, CompactOptions) else options
